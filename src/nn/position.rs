//! Position embeddings: the fixed sine-cosine table, and moving a table to another grid.
//!
//! Table [extra + h*w, D], row `extra + row*w + col` for the patch at (row, col); the extra rows (class token) are zero. With q = D/4 and
//! omega_k = 10000^(-k/q), a patch's row is four blocks of q values:
//!
//!   sin(col omega) | cos(col omega) | sin(row omega) | cos(row omega)
//!
//! The first half is the column. Positions are integers from 0; everything is f64 and rounded to f32 once.
//!
//! Interpolation copies the extra rows and resizes the rest as an image of D channels: Keys cubic with A = -0.75, source coordinate
//! (i + 1/2) old/new - 1/2, four taps an axis, indices clamped to the border, no antialiasing. (Images use A = -0.5 with antialiasing.)

use crate::ensure;
use crate::error::Result;

const A: f64 = -0.75;

/// The sine-cosine table [extra + h*w, dim] of a grid `[h, w]`.
pub fn sincos(grid: [usize; 2], dim: usize, extra: usize) -> Result<Vec<f32>> {
    ensure!(dim > 0 && dim.is_multiple_of(4), "position: width {dim} is not a positive multiple of 4");
    let values = table_len(grid, dim, extra)?;
    let q = dim / 4;
    let omega: Vec<f64> = (0..q).map(|k| 1.0 / 10000f64.powf(k as f64 / q as f64)).collect();
    let mut table = Vec::with_capacity(values);
    table.resize(extra * dim, 0.0);
    for row in 0..grid[0] {
        for col in 0..grid[1] {
            for position in [col, row] {
                table.extend(omega.iter().map(|omega| (position as f64 * omega).sin() as f32));
                table.extend(omega.iter().map(|omega| (position as f64 * omega).cos() as f32));
            }
        }
    }
    Ok(table)
}

/// Moves `table` [extra + old, dim] from the grid `old` = `[h, w]` to the grid `new`. The same grid gives the same numbers.
pub fn interpolate(table: &[f32], dim: usize, extra: usize, old: [usize; 2], new: [usize; 2]) -> Result<Vec<f32>> {
    ensure!(
        table_len(old, dim, extra)? == table.len(),
        "position: the table has {} values but {extra} extra rows and a {} x {} grid of width {dim} were expected",
        table.len(),
        old[0],
        old[1]
    );
    let values = table_len(new, dim, extra)?;
    if old == new {
        return Ok(table.to_vec());
    }
    let (head, grid) = table.split_at(extra * dim);
    let (rows, cols) = (taps(old[0], new[0]), taps(old[1], new[1]));

    let mut wide = Vec::with_capacity(old[0] * new[1] * dim); // [old h, new w, D]
    for row in grid.chunks_exact(old[1] * dim) {
        for taps in &cols {
            wide.extend((0..dim).map(|c| taps.iter().map(|&(x, weight)| weight * f64::from(row[x * dim + c])).sum::<f64>()));
        }
    }
    let mut moved = Vec::with_capacity(values);
    moved.extend_from_slice(head);
    let line = new[1] * dim;
    for taps in &rows {
        moved.extend((0..line).map(|i| taps.iter().map(|&(y, weight)| weight * wide[y * line + i]).sum::<f64>() as f32));
    }
    Ok(moved)
}

/// How many rows in front and which square grid a table of this many rows is for: there is at most one answer.
pub fn square(rows: usize) -> Option<(usize, usize)> {
    (0..=2).find_map(|extra| {
        let side = rows.checked_sub(extra)?.isqrt();
        (side > 0 && side * side + extra == rows).then_some((extra, side))
    })
}

fn table_len(grid: [usize; 2], dim: usize, extra: usize) -> Result<usize> {
    let rows = grid[0].checked_mul(grid[1]).filter(|&patches| patches > 0).and_then(|patches| patches.checked_add(extra));
    let values = rows.and_then(|rows| rows.checked_mul(dim)).filter(|&values| values > 0 && values <= 1 << 30);
    values.ok_or_else(|| {
        crate::error::Error::new(format!("position: no table for a {} x {} grid, {extra} extra rows, width {dim}", grid[0], grid[1]))
    })
}

/// For each of `new` samples along an axis, four source indices and their weights.
fn taps(old: usize, new: usize) -> Vec<[(usize, f64); 4]> {
    let near = |x: f64| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0; // |x| <= 1
    let far = |x: f64| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A; // 1 <= |x| <= 2
    let scale = old as f64 / new as f64;
    (0..new)
        .map(|i| {
            let source = (i as f64 + 0.5) * scale - 0.5;
            let t = source - source.floor();
            let clamped = |offset: f64| (source.floor() + offset).clamp(0.0, (old - 1) as f64) as usize;
            [(clamped(-1.0), far(t + 1.0)), (clamped(0.0), near(t)), (clamped(1.0), near(1.0 - t)), (clamped(2.0), far(2.0 - t))]
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn close(found: &[f32], expected: &[f64], absolute: f64) {
        assert_eq!(found.len(), expected.len());
        for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
            assert!((f64::from(found) - expected).abs() <= absolute, "value {i}: {found} is not {expected}");
        }
    }

    #[test]
    fn table_of_a_small_grid_has_the_column_first() {
        let table = sincos([2, 2], 8, 1).unwrap();
        let (s, t, c, d) = (0.8414709848078965, 0.009999833334166664, 0.5403023058681398, 0.9999500004166653);
        let rows = [[0.0; 8], [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0], [s, t, c, d, 0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0, s, t, c, d]];
        close(&table[..32], &rows.concat(), 3e-8);
        close(&table[32..], &[s, t, c, d, s, t, c, d], 3e-8);
    }

    #[test]
    fn table_of_vit_base_has_the_published_values() {
        let table = sincos([14, 14], 768, 1).unwrap();
        assert_eq!(table.len(), 197 * 768);
        for (row, column, expected) in [
            (2, 0, 0.8414709848),
            (2, 1, 0.8152506497),
            (2, 192, 0.5403023059),
            (2, 384, 0.0),
            (2, 576, 1.0),
            (15, 0, 0.0),
            (15, 384, 0.8414709848),
            (196, 191, 0.00136388122503),
            (196, 767, 0.99999906991),
            (100, 100, 0.00825394812945),
        ] {
            close(&[table[row * 768 + column]], &[expected], 3e-8);
        }
    }

    #[test]
    fn table_of_a_rectangle_is_cut_from_the_square_one() {
        let (wide, square) = (sincos([3, 5], 12, 0).unwrap(), sincos([5, 5], 12, 2).unwrap());
        assert_eq!(wide, square[2 * 12..(2 + 15) * 12]);
        let tall = sincos([5, 3], 12, 0).unwrap();
        for row in 0..5 {
            assert_eq!(tall[row * 36..(row + 1) * 36], square[(2 + row * 5) * 12..(2 + row * 5 + 3) * 12]);
        }
    }

    #[test]
    fn interpolation_has_the_published_values() {
        let grid: Vec<f32> = (1..=9).map(|i| i as f32).collect();
        let up = [
            0.712890625,
            1.314453125,
            2.2548828125,
            2.8564453125,
            2.517578125,
            3.119140625,
            4.0595703125,
            4.6611328125,
            5.3388671875,
            5.9404296875,
            6.880859375,
            7.482421875,
            7.1435546875,
            7.7451171875,
            8.685546875,
            9.287109375,
        ];
        close(&interpolate(&grid, 1, 0, [3, 3], [4, 4]).unwrap(), &up, 1e-7);
        close(&interpolate(&grid, 1, 0, [3, 3], [2, 2]).unwrap(), &[1.765625, 3.3828125, 6.6171875, 8.234375], 1e-7);
    }

    #[test]
    fn interpolation_copies_extra_rows_and_equal_grids() {
        let table: Vec<f32> = (0..(2 + 6) * 4).map(|i| (i as f32).sin()).collect();
        assert_eq!(interpolate(&table, 4, 2, [2, 3], [2, 3]).unwrap(), table);
        let moved = interpolate(&table, 4, 2, [2, 3], [3, 5]).unwrap();
        assert_eq!(moved.len(), (2 + 15) * 4);
        assert_eq!(moved[..8], table[..8]);
    }

    #[test]
    fn interpolation_treats_the_axes_of_a_rectangle_apart() {
        let by_column: Vec<f32> = [1.0, 2.0, 4.0].repeat(2); // 2 x 3, rows equal
        let by_row: Vec<f32> = [1.0, 2.0, 4.0].into_iter().flat_map(|v| [v, v]).collect(); // 3 x 2, columns equal
        let wide = interpolate(&by_column, 1, 0, [2, 3], [4, 7]).unwrap();
        let tall = interpolate(&by_row, 1, 0, [3, 2], [7, 4]).unwrap();
        for i in 0..7 {
            for j in 0..4 {
                assert!((wide[j * 7 + i] - tall[i * 4 + j]).abs() < 1e-6);
                assert!((wide[j * 7 + i] - wide[i]).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn rows_say_which_square_they_are_for() {
        for (rows, extra, side) in [(196, 0, 14), (197, 1, 14), (198, 2, 14), (577, 1, 24), (4, 0, 2), (5, 1, 2), (37, 1, 6), (3, 2, 1)] {
            assert_eq!(square(rows), Some((extra, side)), "{rows}");
        }
        assert!([0, 7, 8, 13, 199, usize::MAX].into_iter().all(|rows| square(rows).is_none()));
    }

    #[test]
    fn impossible_tables_are_errors() {
        assert!(sincos([2, 2], 6, 0).is_err());
        assert!(sincos([0, 2], 8, 1).is_err());
        assert!(sincos([usize::MAX, 2], 8, 1).is_err());
        assert!(interpolate(&[0.0; 9], 1, 1, [3, 3], [2, 2]).is_err());
        assert!(interpolate(&[0.0; 9], 1, 0, [3, 3], [0, 2]).is_err());
    }
}
