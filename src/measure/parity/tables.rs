//! Cases of what is computed without a gradient: position tables, schedules, images.

use super::case::{Case, Fields};
use super::compare::Record;
use super::ops::input;
use crate::data::mixup::{cutmix, cutmix_box, mix_targets, mixup};
use crate::data::resize::{self, Crop, IMAGENET_MEAN, IMAGENET_STD};
use crate::error::{Context, Result};
use crate::nn::position;
use crate::optim::schedule::{TimmCosine, mae_cosine};
use crate::{bail, ensure};

/// Runs the operation; false if there is none of this name.
pub fn run(case: &Case, record: &mut Record) -> Result<bool> {
    let one: fn(&Case, usize, &Fields, &mut Record) -> Result<()> = match case.part("options")?.text("op")? {
        "sincos_pos_embed" => sincos,
        "interpolate_pos_embed" => interpolate,
        "mixup_cutmix" => mix,
        "eval_transform" => eval_transform,
        "random_resized_crop" => crop,
        "lr_schedules" => {
            return schedules(case, record).map(|()| true);
        }
        _ => return Ok(false),
    };
    for (i, spec) in case.specs()?.iter().enumerate() {
        one(case, i, spec, record).with_context(|| format!("sub-case {i}"))?;
    }
    Ok(true)
}

fn whole(numbers: &[f32]) -> Vec<f64> {
    numbers.iter().map(|&x| x.into()).collect()
}

fn bytes(pixels: &[u8]) -> Vec<f64> {
    pixels.iter().map(|&byte| byte.into()).collect()
}

/// The element count of a golden, which bounds what is computed for it.
fn wanted(case: &Case, name: &str, sizes: &[usize]) -> Result<()> {
    let golden = case.file.get(name)?;
    let numel = sizes.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
    ensure!(numel == Some(golden.numel()), "{name} is {golden:?} but the description asks for {sizes:?}");
    Ok(())
}

fn sincos(case: &Case, _: usize, spec: &Fields, record: &mut Record) -> Result<()> {
    let (dim, grid, class) = (spec.size("embed_dim")?, spec.sides("grid_size")?, spec.flag_or("cls_token", false)?);
    let side = if grid[0] == grid[1] { grid[0].to_string() } else { format!("{}x{}", grid[0], grid[1]) };
    let name = format!("out/dim{dim}_grid{side}_cls{}", usize::from(class));
    let rows = grid[0].saturating_mul(grid[1]).saturating_add(usize::from(class));
    wanted(case, &name, &[rows, dim])?;
    let table = position::sincos(grid, dim, usize::from(class))?;
    record.numbers(name, &[rows, dim], whole(&table));
    Ok(())
}

fn interpolate(case: &Case, i: usize, spec: &Fields, record: &mut Record) -> Result<()> {
    let (dim, extra) = (spec.size("embed_dim")?, spec.size("extra_tokens")?);
    let (old, new) = (spec.sides("old_grid")?, spec.sides("new_grid")?);
    let name = format!("out/pos_embed{i}");
    let rows = new[0].saturating_mul(new[1]).saturating_add(extra);
    wanted(case, &name, &[rows, dim])?;
    let moved = position::interpolate(&case.floats(&format!("in/pos_embed{i}"))?, dim, extra, old, new)?;
    record.numbers(name, &[1, rows, dim], whole(&moved));
    Ok(())
}

fn mix(case: &Case, i: usize, spec: &Fields, record: &mut Record) -> Result<()> {
    let name = input(case, i, "images");
    let &[batch, channels, h, w] = case.file.get(&name)?.shape() else { bail!("{name} is no [B, C, H, W]") };
    let classes = case.part("options")?.size("num_classes")?;
    let (mut images, labels) = (case.floats(&name)?, case.labels(&input(case, i, "labels"))?);
    let (mut lam, smoothing) = (spec.number("lam")?, spec.number_or("smoothing", 0.0)?);
    match spec.text("kind")? {
        "mixup" => mixup(&mut images, batch, lam)?,
        "cutmix" => {
            let centre = spec.sides("center")?;
            let (cut, left) = cutmix_box(h, w, lam, centre[0], centre[1])?;
            cutmix(&mut images, [batch, channels, h, w], cut)?;
            lam = left;
        }
        other => bail!("there is no mixing {other:?}, only mixup and cutmix"),
    }
    let corrected = spec.number_or("lam_corrected", lam)?;
    let near = (lam - corrected).abs() <= 1e-12;
    ensure!(near, "the share left is {lam} but lam_corrected is {corrected}");
    record.numbers(format!("out/{i}/images"), &[batch, channels, h, w], whole(&images));
    wanted(case, &format!("out/{i}/targets"), &[batch, classes])?;
    let targets = mix_targets(&labels, classes, lam, smoothing)?;
    record.numbers(format!("out/{i}/targets"), &[labels.len(), classes], whole(&targets));
    Ok(())
}

fn eval_transform(case: &Case, i: usize, spec: &Fields, record: &mut Record) -> Result<()> {
    const MOST_PIXELS: usize = 1 << 24;
    let options = case.part("options")?;
    let size = |key: &str| if spec.has(key) { spec.size(key) } else { options.size(key) };
    let (short, side) = (size("resize")?, size("crop")?);
    let (pixels, [height, width]) = image(case, i)?;
    let to = resize::short_side_size([height, width], short)?;
    ensure!(to[0] * to[1] <= MOST_PIXELS, "an image of {} x {} is larger than a case may have", to[0], to[1]);
    let cropped = resize::eval_transform(&pixels, [height, width], 3, short, side)?;
    record.numbers(format!("out/{i}/cropped_u8_hwc"), &[side, side, 3], bytes(&cropped));
    let planes = resize::normalise(&cropped, [side, side], &IMAGENET_MEAN, &IMAGENET_STD)?;
    let every_fourth = |row: usize| (0..side).step_by(4).map(move |x| (row, x));
    let places = (0..3 * side).filter(|row| (row % side).is_multiple_of(4)).flat_map(every_fourth);
    let few = side.div_ceil(4);
    let sample = places.map(|(row, x)| planes[row * side + x].into()).collect();
    record.numbers(format!("out/{i}/normalized"), &[3, few, few], sample);
    Ok(())
}

fn crop(case: &Case, i: usize, spec: &Fields, record: &mut Record) -> Result<()> {
    let (pixels, size) = image(case, i)?;
    let [h, w] = spec.sides("out")?;
    let name = format!("out/{i}/crop_u8_hwc");
    wanted(case, &name, &[h, w, 3])?;
    let rectangle = Crop { top: spec.size("top")?, left: spec.size("left")?, height: spec.size("height")?, width: spec.size("width")? };
    let mut cut = resize::crop_resize(&pixels, size, 3, rectangle, [h, w])?;
    if spec.flag_or("hflip", false)? {
        resize::hflip(&mut cut, [h, w], 3)?;
    }
    record.numbers(name, &[h, w, 3], bytes(&cut));
    Ok(())
}

/// The bytes and the size of a sub-case's RGB image.
fn image(case: &Case, i: usize) -> Result<(Vec<u8>, [usize; 2])> {
    let name = input(case, i, "image_u8_hwc");
    let stored = case.file.get(&name)?;
    match (stored.dtype(), stored.shape()) {
        (crate::formats::FileDtype::U8, &[height, width, 3]) => Ok((stored.bytes().to_vec(), [height, width])),
        _ => bail!("{name} is {stored:?} but bytes [H, W, 3] are needed"),
    }
}

fn schedules(case: &Case, record: &mut Record) -> Result<()> {
    let options = case.part("options")?;
    let list = |key: &str| if options.has(key) { options.objects(key) } else { Ok(Vec::new()) };
    for (i, spec) in list("mae")?.iter().enumerate() {
        let name = format!("out/mae{i}/lr");
        let (peak, floor) = (spec.number("lr")?, spec.number_or("min_lr", 0.0)?);
        let (warmup, epochs) = (spec.number("warmup_epochs")?, spec.number("epochs")?);
        let (iters, stride) = (spec.size("iters_per_epoch")?, spec.size_or("stride", 1)?);
        let count = case.file.get(&name)?.numel();
        let rate = |j: usize| mae_cosine((j * stride) as f64 / iters as f64, peak, floor, warmup, epochs);
        record.numbers(name, &[count], (0..count).map(rate).collect());
    }
    for (i, spec) in list("timm")?.iter().enumerate() {
        let count = spec.size("n")?;
        let warmup = (spec.size_or("warmup_t", 0)?, spec.number_or("warmup_lr_init", 0.0)?);
        let mut timm = TimmCosine::new(spec.number("lr")?, spec.size("t_initial")?, spec.number_or("lr_min", 0.0)?, warmup.0, warmup.1);
        timm.cycle_limit = spec.size_or("cycle_limit", 1)?;
        timm.decay_rate = spec.number_or("decay_rate", 1.0)?;
        let rates = std::iter::once(timm.at_construction()).chain((0..count).map(|t| timm.at(t))).collect();
        record.numbers(format!("out/timm{i}/lr"), &[count + 1], rates);
    }
    Ok(())
}
