//! Several masks of one image, each of which hides what those before it showed (DMJD, arXiv 2301.00230).
//!
//! Of U units (patches, or blocks of 2 x 2 patches) each view keeps K = int(U (1 - c)) and hides U - K, c the corruption rate. The first view sorts an
//! image's units by their noise. Each further view hides, of the units that no view has hidden yet, x = min(int(c U), int((r - c) U) less those so hidden
//! before, all that are left), r the prediction rate; the rest of what it hides are units that were hidden before:
//!
//!   kept    seen[p[x..]] , hidden[q[U - K - x..]]          seen: units that no view has hidden, hidden: the others
//!   hidden  seen[p[..x]] , hidden[q[..U - K - x]]          p, q: permutations, the same ones for the whole batch
//!
//! For c of at least 1/2 and r = 1 two views show disjoint units, so that together they predict everything. Tokens of a block stand apart: the upper left
//! ones of all kept units, the upper right ones, the lower left, the lower right, then those of the hidden units. All arithmetic is f64, cut off.
//!
//! Rows of the result are all images' first views, then all second views. GPU: kernels/masking.cu.

use super::{Mask, random, units};
use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch};
use crate::ensure;
use crate::error::Result;
use crate::rng::Rng;
use crate::tensor::{Device, Dtype, Tensor};

/// What is hidden, and in how many views.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Rates {
    /// Part of the units that each view hides.
    pub corruption: f64,
    /// Part of the units that are hidden in at least one view.
    pub prediction: f64,
    pub views: usize,
}

/// The views of a grid of patches.
#[derive(Clone, Debug)]
pub struct Disjoint {
    grid: [usize; 2],
    /// Side of a unit.
    side: usize,
    keep: usize,
    hide: usize,
    /// Units that each view after the first is the first to hide.
    fresh: Vec<usize>,
}

impl Disjoint {
    /// `side` patches along a side of a unit: 1, or 2 for blocks.
    pub fn new(grid: [usize; 2], side: usize, rates: Rates) -> Result<Self> {
        let Rates { corruption, prediction, views } = rates;
        units(1, grid, side)?;
        let count = grid.iter().product::<usize>() / (side * side);
        ensure!(corruption > 0.0 && corruption < 1.0, "each view hides {corruption} of an image; it has to be a part between 0 and 1");
        ensure!(
            prediction >= corruption && prediction <= 1.0,
            "{prediction} of an image are to be predicted, of which each view alone hides {corruption}; it is a part from there to 1"
        );
        ensure!(views >= 1, "{views} views show nothing");
        let keep = (count as f64 * (1.0 - corruption)) as usize;
        ensure!(keep > 0 && keep < count, "hiding {corruption} of {count} units keeps {keep}; at least one has to be kept and one hidden");
        let of = |part: f64| (part * count as f64) as usize;
        let (most, budget) = (of(corruption), of(prediction - corruption));
        let mut fresh = Vec::new();
        for _ in 1..views {
            let so_far: usize = fresh.iter().sum();
            fresh.push(most.min(budget - so_far).min(keep - so_far));
        }
        Ok(Self { grid, side, keep, hide: count - keep, fresh })
    }

    /// One view that hides nothing, and in which all patches are predicted: what others are measured against.
    pub fn whole(grid: [usize; 2]) -> Self {
        Self { grid, side: 1, keep: grid.iter().product(), hide: 0, fresh: Vec::new() }
    }

    pub fn views(&self) -> usize {
        1 + self.fresh.len()
    }

    /// Patches of an image, and how many each view keeps.
    pub fn patches(&self) -> usize {
        self.grid.iter().product()
    }

    pub fn kept_each(&self) -> usize {
        self.keep * self.each()
    }

    /// Patches that at least one view hides; all where nothing is hidden.
    pub fn predicted(&self) -> usize {
        let hidden = self.hide + self.fresh.iter().sum::<usize>();
        if hidden == 0 { self.patches() } else { hidden * self.each() }
    }

    /// Patches of a unit.
    pub fn each(&self) -> usize {
        self.side * self.side
    }

    fn units(&self) -> usize {
        self.keep + self.hide
    }

    /// The masks of so many images: `views` times as many rows.
    pub fn draw(&self, batch: usize, device: &Device, rng: &Rng) -> Result<Mask> {
        let sorted = |noise: &Tensor| Ok(random(noise, 0)?.shuffle);
        let noise = Tensor::drawn(device, rng, "mask", &[batch, self.units()])?;
        if self.hide == 0 {
            return Ok(Mask { hidden: random(&noise, 0)?.hidden, ..random(&noise, self.keep)? });
        }
        let first = sorted(&noise)?;
        let mut permutations = Vec::with_capacity(self.fresh.len());
        let mut seen = self.keep;
        for (view, &fresh) in self.fresh.iter().enumerate() {
            let order = |what: &str, n: usize| sorted(&Tensor::drawn_once(device, rng, &format!("view {} {what}", view + 2), &[1, n])?);
            permutations.push([order("seen", seen)?, order("hidden", self.units() - seen)?]);
            seen -= fresh;
        }
        match device.gpu() {
            None => self.masks(&first, &permutations),
            Some(gpu) => self.masks_on(gpu, &first, &permutations),
        }
    }

    /// From the units in the order of their noise, u32 [B, U], and the permutations of each further view.
    fn masks(&self, first: &Tensor, permutations: &[[Tensor; 2]]) -> Result<Mask> {
        let (units, patches, kept_each, batch) = (self.units(), self.patches(), self.kept_each(), first.rows());
        let orders = self.orders(permutations);
        let index = |columns| Tensor::empty(&[self.views() * batch, columns], Dtype::U32);
        let (mut kept, mut shuffle, mut restore) = (index(kept_each)?, index(patches)?, index(patches)?);
        let mut hidden = Tensor::empty(&[self.views() * batch, patches], Dtype::F32)?;
        let (all_kept, all_shuffle) = (kept.data_mut::<u32>(), shuffle.data_mut::<u32>());
        let (all_restore, all_hidden) = (restore.data_mut::<u32>(), hidden.data_mut::<f32>());
        for (row, (order, image)) in orders.iter().flat_map(|order| (0..batch).map(move |image| (order, image))).enumerate() {
            let sorted = &first.data::<u32>()[image * units..][..units];
            let at = row * patches;
            for place in 0..patches {
                let (unit, corner) = self.member(place);
                let patch = self.patch(sorted[order[unit] as usize] as usize, corner);
                all_shuffle[at + place] = patch as u32;
                all_restore[at + patch] = place as u32;
                all_hidden[at + patch] = if place < kept_each { 0.0 } else { 1.0 };
            }
            all_kept[row * kept_each..][..kept_each].copy_from_slice(&all_shuffle[at..at + kept_each]);
        }
        Ok(Mask { kept, shuffle, restore, hidden })
    }

    fn masks_on(&self, gpu: &Gpu, first: &Tensor, permutations: &[[Tensor; 2]]) -> Result<Mask> {
        let (units, patches, rows) = (self.units(), self.patches(), self.views() * first.rows());
        let index = |rows, columns| first.alike(&[rows, columns], Dtype::U32);
        let (mut orders, mut states) = (index(self.views(), units)?, index(self.views(), units)?);
        let mut seen = self.keep;
        for view in 0..self.views() {
            // Nothing is permuted before the first view.
            let (by, fresh) = view.checked_sub(1).map_or((None, 0), |at| (Some(&permutations[at]), self.fresh[at]));
            let args = Args::new().out(&mut orders).out(&mut states).maybe(by.map(|[p, _]| p)).maybe(by.map(|[_, q]| q));
            let args = args.int(view).int(units).int(self.keep).int(seen).int(fresh);
            gpu.launch("disjoint_order_u32", Launch::elements(units, 1), args.fault())?;
            seen -= fresh;
        }
        let (mut kept, mut shuffle, mut restore) = (index(rows, self.kept_each())?, index(rows, patches)?, index(rows, patches)?);
        let mut hidden = first.alike(&[rows, patches], Dtype::F32)?;
        let args = Args::new().out(&mut shuffle).out(&mut restore).out(&mut kept).out(&mut hidden).input(first).input(&orders);
        let args = args.int(first.rows()).int(units).int(self.keep).int(self.side).int(self.grid[1] / self.side).int(rows * patches);
        gpu.launch("disjoint_masks_u32", Launch::elements(rows * patches, 1), args.fault())?;
        Ok(Mask { kept, shuffle, restore, hidden })
    }

    /// For each view the places, in the first view's order, of its units: those that it keeps, then those that it hides.
    fn orders(&self, permutations: &[[Tensor; 2]]) -> Vec<Vec<u32>> {
        let units = self.units() as u32;
        let (mut seen, mut hidden): (Vec<u32>, Vec<u32>) = ((0..self.keep as u32).collect(), (self.keep as u32..units).collect());
        let mut orders = vec![(0..units).collect::<Vec<u32>>()];
        for (&fresh, [p, q]) in self.fresh.iter().zip(permutations) {
            let permuted = |of: &[u32], by: &Tensor| by.data::<u32>().iter().map(|&i| of[i as usize]).collect::<Vec<u32>>();
            let (p, q) = (permuted(&seen, p), permuted(&hidden, q));
            let again = self.hide - fresh;
            orders.push([&p[fresh..], &q[again..], &p[..fresh], &q[..again]].concat());
            (seen, hidden) = (p[fresh..].to_vec(), [&q[..], &p[..fresh]].concat());
        }
        orders
    }

    /// Which of a view's units, and which patch of it, stands at this place of its order.
    fn member(&self, place: usize) -> (usize, usize) {
        match place.checked_sub(self.kept_each()) {
            None => (place % self.keep, place / self.keep),
            Some(place) => (self.keep + place % self.hide, place / self.hide),
        }
    }

    /// The patch at this corner of a unit.
    fn patch(&self, unit: usize, corner: usize) -> usize {
        let [_, columns] = self.grid;
        let across = columns / self.side;
        (unit / across * self.side + corner / self.side) * columns + unit % across * self.side + corner % self.side
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn a_view_of_the_whole_keeps_and_predicts_every_patch() {
        let whole = Disjoint::whole([3, 4]);
        let mask = whole.draw(2, &Device::Cpu, &Rng::new(1)).unwrap();
        assert_eq!([whole.views(), whole.kept_each(), whole.predicted(), mask.kept_each()], [1, 12, 12, 12]);
        assert!(mask.hidden.data::<f32>().iter().all(|&x| x == 1.0));
        for row in mask.kept.data::<u32>().chunks(12) {
            let mut sorted = row.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..12).collect::<Vec<u32>>());
        }
    }

    fn rates(corruption: f64, prediction: f64, views: usize) -> Rates {
        Rates { corruption, prediction, views }
    }

    fn grid(units: usize) -> ([usize; 2], usize) {
        ([14, 14], if units == 49 { 2 } else { 1 })
    }

    #[test]
    fn counts_are_those_of_the_table() {
        for (corruption, units, keep, extra) in [
            (0.4, 49, 29, 19),
            (0.5, 49, 24, 24),
            (0.6, 49, 19, 19),
            (0.7, 49, 14, 14),
            (0.75, 49, 12, 12),
            (0.8, 49, 9, 9),
            (0.9, 49, 4, 4),
            (0.4, 196, 117, 78),
            (0.5, 196, 98, 98),
            (0.6, 196, 78, 78),
            (0.7, 196, 58, 58),
            (0.75, 196, 49, 49),
            (0.8, 196, 39, 39),
            (0.9, 196, 19, 19),
        ] {
            let (grid, side) = grid(units);
            let plan = Disjoint::new(grid, side, rates(corruption, 1.0, 2)).unwrap();
            assert_eq!((plan.keep, plan.fresh[0]), (keep, extra), "{corruption} of {units}");
            let predicted = if corruption < 0.5 { plan.hide + extra } else { units };
            assert_eq!(plan.predicted(), predicted * side * side);
        }
        let part = Disjoint::new([14, 14], 2, rates(0.6, 0.8, 2)).unwrap();
        assert_eq!((part.fresh[0], part.predicted()), (9, 156));
        assert_eq!(Disjoint::new([14, 14], 2, rates(0.4, 1.0, 2)).unwrap().predicted(), 156);
    }

    /// Noise whose order is this permutation.
    fn noise_of(permutation: impl Iterator<Item = usize>, n: usize) -> Vec<f32> {
        let mut noise = vec![0.0; n];
        permutation.enumerate().for_each(|(i, at)| noise[at] = i as f32 / n as f32);
        noise
    }

    fn coprime(n: usize) -> usize {
        let divisor = |mut a: usize, mut b: usize| {
            while b > 0 {
                (a, b) = (b, a % b);
            }
            a
        };
        (5..).find(|&a| divisor(a, n) == 1).unwrap()
    }

    fn worked(units: usize, corruption: f64) -> Mask {
        let (grid, side) = grid(units);
        let plan = Disjoint::new(grid, side, rates(corruption, 1.0, 2)).unwrap();
        let noise = (0..2 * units).map(|at| ((37 * (at % units) + 11 + 5 * (at / units)) % units) as f32 / units as f32).collect();
        let permutation = |n: usize| noise_of((0..n).map(|j| (coprime(n) * j + 3) % n), n);
        let recorded = [
            ("mask".to_string(), noise),
            ("view 2 seen".to_string(), permutation(plan.keep)),
            ("view 2 hidden".to_string(), permutation(plan.hide)),
        ];
        plan.draw(2, &Device::Cpu, &Rng::replaying(BTreeMap::from(recorded))).unwrap()
    }

    #[test]
    fn masks_are_those_of_the_worked_example() {
        let check = |mask: &Mask, row: usize, first: [u32; 12], sums: [usize; 2], restore: [u32; 8]| {
            let k = mask.kept_each();
            let kept = &mask.kept.data::<u32>()[row * k..(row + 1) * k];
            assert_eq!(kept[..12], first, "row {row}");
            let weighted: usize = kept.iter().enumerate().map(|(i, &id)| (i + 1) * id as usize).sum();
            assert_eq!([kept.iter().map(|&id| id as usize).sum::<usize>(), weighted], sums, "row {row}");
            assert_eq!(mask.restore.data::<u32>()[row * 196..][..8], restore, "row {row}");
        };
        let block = worked(49, 0.6);
        check(&block, 0, [10, 32, 40, 62, 84, 92, 114, 122, 144, 152, 174, 0], [6298, 255166], [11, 30, 105, 135, 93, 123, 81, 111]);
        check(&block, 1, [124, 146, 168, 176, 2, 10, 32, 40, 62, 84, 92, 114], [7290, 285518], [16, 35, 4, 23, 98, 128, 86, 116]);
        check(&block, 2, [56, 168, 180, 96, 12, 124, 150, 66, 178, 94, 120, 36], [8458, 332982], [89, 119, 103, 133, 97, 127, 15, 34]);
        check(&block, 3, [170, 86, 112, 28, 140, 56, 68, 180, 96, 12, 38, 150], [7938, 314866], [90, 120, 80, 110, 102, 132, 96, 126]);
        let rows = ["0111001", "1001100", "1100110", "0110011", "0011101", "1101110", "1110111"];
        let second = ["1110110", "1110011", "0111001", "1111100", "1110010", "1110001", "0111000"];
        for (row, units) in [(0, rows), (2, second)] {
            for (at, expected) in units.concat().bytes().enumerate() {
                let patch = at / 7 * 28 + at % 7 * 2;
                assert_eq!(block.hidden.data::<f32>()[row * 196 + patch], f32::from(expected - b'0'), "row {row}, unit {at}");
            }
        }
        let block = worked(49, 0.75);
        check(&block, 0, [10, 32, 40, 62, 84, 92, 114, 122, 144, 152, 174, 0], [4464, 118540], [11, 23, 84, 121, 72, 109, 60, 97]);
        check(&block, 2, [88, 170, 56, 124, 8, 90, 172, 58, 140, 12, 94, 176], [5112, 129996], [52, 89, 74, 111, 79, 116, 84, 121]);
        let random = worked(196, 0.6);
        check(&random, 0, [5, 58, 111, 164, 21, 74, 127, 180, 37, 90, 143, 0], [7453, 301607], [11, 48, 85, 122, 159, 0, 37, 74]);
        check(&random, 2, [20, 89, 158, 31, 100, 169, 42, 129, 2, 71, 140, 13], [7483, 298078], [142, 87, 8, 39, 70, 93, 116, 139]);
        let random = worked(196, 0.75);
        check(&random, 0, [5, 58, 111, 164, 21, 74, 127, 180, 37, 90, 143, 0], [4557, 115689], [11, 48, 85, 122, 159, 0, 37, 74]);
        check(&random, 2, [66, 135, 8, 77, 146, 19, 88, 157, 30, 99, 168, 41], [4704, 116865], [80, 58, 134, 112, 41, 68, 95, 24]);
    }

    /// How often each patch of each image is hidden.
    fn times_hidden(mask: &Mask, plan: &Disjoint, batch: usize) -> Vec<f32> {
        let size = batch * plan.patches();
        (0..size).map(|at| (0..plan.views()).map(|view| mask.hidden.data::<f32>()[view * size + at]).sum()).collect()
    }

    #[test]
    fn two_views_show_disjoint_patches_and_predict_all_of_them_at_a_prediction_rate_of_1() {
        for seed in 0..40 {
            for (grid, side) in [([14, 14], 1), ([14, 14], 2), ([6, 6], 2), ([4, 10], 2), ([3, 5], 1)] {
                for corruption in [0.5, 0.6, 0.75, 0.8] {
                    let plan = Disjoint::new(grid, side, rates(corruption, 1.0, 2)).unwrap();
                    let mask = plan.draw(3, &Device::Cpu, &Rng::new(seed)).unwrap();
                    let hidden = times_hidden(&mask, &plan, 3);
                    assert!(hidden.iter().all(|&times| times >= 1.0), "{grid:?} {side} {corruption}: not everything is predicted");
                    let shown: f32 = hidden.iter().map(|times| 2.0 - times).sum();
                    assert_eq!(shown as usize, 2 * 3 * plan.kept_each());
                }
            }
        }
    }

    #[test]
    fn every_view_keeps_as_many_and_predicts_what_was_promised() {
        for seed in 0..20 {
            for (side, corruption, prediction, views) in [
                (1, 0.75, 1.0, 4),
                (2, 0.6, 0.8, 2),
                (1, 0.4, 1.0, 3),
                (2, 0.4, 1.0, 2),
                (1, 0.3, 0.3, 3),
                (2, 0.9, 0.95, 3),
                (1, 0.75, 0.9, 1),
            ] {
                let plan = Disjoint::new([14, 14], side, rates(corruption, prediction, views)).unwrap();
                let mask = plan.draw(2, &Device::Cpu, &Rng::new(seed)).unwrap();
                assert_eq!((mask.images(), mask.kept_each()), (2 * views, plan.kept_each()));
                let hidden = times_hidden(&mask, &plan, 2);
                assert_eq!(hidden.iter().filter(|&&times| times > 0.0).count(), 2 * plan.predicted());
                for (row, restore) in mask.restore.data::<u32>().chunks_exact(196).enumerate() {
                    for (patch, &place) in restore.iter().enumerate() {
                        assert_eq!(mask.shuffle.data::<u32>()[row * 196 + place as usize] as usize, patch);
                        assert_eq!(mask.hidden.data::<f32>()[row * 196 + patch] == 0.0, (place as usize) < mask.kept_each());
                    }
                }
            }
        }
    }

    #[test]
    fn each_fresh_view_hides_what_no_view_before_it_hid() {
        let plan = Disjoint::new([14, 14], 1, rates(0.4, 1.0, 3)).unwrap();
        let mask = plan.draw(1, &Device::Cpu, &Rng::new(5)).unwrap();
        let hidden = |view: usize, patch: usize| mask.hidden.data::<f32>()[view * 196 + patch] == 1.0;
        let fresh = |view: usize| (0..196).filter(|&patch| hidden(view, patch) && (0..view).all(|before| !hidden(before, patch))).count();
        assert_eq!([fresh(0), fresh(1), fresh(2)], [79, 78, 39]);
    }

    #[test]
    fn rates_that_are_none_and_grids_that_hold_no_block_are_refused() {
        let said = |grid, side, rates| Disjoint::new(grid, side, rates).unwrap_err().to_string();
        assert!(said([14, 14], 2, rates(0.6, 0.5, 2)).contains("each view alone hides 0.6"));
        assert!(said([14, 14], 2, rates(0.6, 1.5, 2)).contains("from there to 1"));
        assert!(said([14, 14], 2, rates(1.0, 1.0, 2)).contains("between 0 and 1"));
        assert!(said([14, 14], 2, rates(f64::NAN, 1.0, 2)).contains("between 0 and 1"));
        assert!(said([2, 2], 2, rates(0.5, 1.0, 2)).contains("keeps 0"));
        assert!(said([7, 14], 2, rates(0.6, 1.0, 2)).contains("7 x 14 patches"));
        assert!(said([14, 14], 1, rates(0.6, 1.0, 0)).contains("0 views"));
    }
}
