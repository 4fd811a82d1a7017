//! The loader: batches do not depend on who fills them, what cannot be read is counted and never mislabelled, threads end.

use masque::bail;
use masque::data::erase::{Erasing, Filling};
use masque::data::loader::{Filled, Loaded, Loader, LoaderOptions};
use masque::data::mixing::Mixing;
use masque::data::order::Order;
use masque::data::transform::{Crop, Transform};
use masque::data::{Dataset, Picture, augment};
use masque::error::Result;
use masque::rng::Rng;
use masque::tensor::Device;
use masque::train::feed::{Feed, Labels};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const SIDE: usize = 8;

/// Images whose numbers tell which one they are; some cannot be read, some make the reader panic, each takes a time of its own.
struct Numbers {
    len: usize,
    bad: fn(usize) -> bool,
    panics: fn(usize) -> bool,
    channels: fn(usize) -> usize,
    read: AtomicUsize,
}

fn numbers(len: usize) -> Numbers {
    Numbers { len, bad: |_| false, panics: |_| false, channels: |_| 3, read: AtomicUsize::new(0) }
}

fn label_of(index: usize) -> u32 {
    (index * 7 % 11) as u32
}

fn pixel_of(index: usize, at: usize) -> u8 {
    (index * 31 + at * 5) as u8
}

impl Dataset for Numbers {
    fn len(&self) -> usize {
        self.len
    }

    fn classes(&self) -> &[String] {
        &[]
    }

    fn label(&self, index: usize) -> u32 {
        label_of(index)
    }

    fn name(&self, index: usize) -> String {
        format!("number {index}")
    }

    fn picture(&self, index: usize) -> Result<Picture> {
        self.read.fetch_add(1, Ordering::SeqCst);
        std::thread::sleep(Duration::from_micros((index * 7919 % 13 * 40) as u64));
        assert!(!(self.panics)(index), "no picture of {index}");
        if (self.bad)(index) {
            bail!("number {index}: it is torn");
        }
        let channels = (self.channels)(index);
        Picture::new([SIDE, SIDE], channels, (0..SIDE * SIDE * channels).map(|at| pixel_of(index, at)).collect())
    }
}

fn transform(flip: bool, erasing: Option<Erasing>) -> Transform {
    Transform { flip, erasing, crop: Crop::Whole, ..Transform::evaluate(SIDE) }
}

fn loader(numbers: Numbers, options: LoaderOptions) -> Loader {
    Loader::new(Arc::new(numbers), transform(options.order != Order::Sequential, None), options)
}

fn shuffled(batch: usize, workers: usize) -> LoaderOptions {
    LoaderOptions { batch, workers, order: Order::Shuffled, seed: 5, ..LoaderOptions::default() }
}

fn sequential(batch: usize, workers: usize) -> LoaderOptions {
    LoaderOptions { order: Order::Sequential, ..shuffled(batch, workers) }
}

type Plain = (Vec<u8>, Vec<u32>, Vec<usize>);

fn plain(loaded: Loaded) -> Plain {
    (loaded.bytes.data::<u8>().to_vec(), loaded.labels, loaded.indices)
}

fn epoch(loader: &Loader, epoch: u64, first: usize) -> Vec<Plain> {
    loader.epoch(epoch, first).map(|loaded| plain(loaded.unwrap())).collect()
}

fn bad(index: usize) -> bool {
    index % 9 == 4
}

#[test]
fn the_number_of_workers_never_changes_a_batch() {
    for (order, batch, batches) in [(Order::Shuffled, 5, 10), (Order::Sequential, 7, 8), (Order::Repeated { times: 3 }, 4, 13)] {
        let with = |workers: usize| {
            let loader = loader(Numbers { bad, ..numbers(53) }, LoaderOptions { order, ..shuffled(batch, workers) });
            assert_eq!(loader.batches(), batches);
            let both = [epoch(&loader, 0, 0), epoch(&loader, 1, 0)];
            assert_eq!(both.each_ref().map(Vec::len), [batches; 2]);
            (both, loader.skipped())
        };
        let one = with(1);
        assert!(order == Order::Sequential || one.0[0] != one.0[1], "an epoch is like another");
        for workers in [0, 2, 4, 7] {
            assert_eq!(with(workers), one, "{workers} workers, {order:?}");
        }
    }
}

/// Both views of a batch.
fn views(loaded: &Loaded) -> [Vec<u8>; 2] {
    [loaded.clean.as_ref().unwrap(), &loaded.bytes].map(|view| view.data::<u8>().to_vec())
}

#[test]
fn two_views_of_a_batch_are_the_cut_and_the_jittered_one_whoever_made_them() {
    let cut = Transform { crop: Crop::Padded { padding: 2 }, ..Transform::mae_pretrain(SIDE) };
    let both = cut.clone().two_views(0.4).unwrap();
    let jittered = Transform { clean: false, ..both.clone() };
    let epoch = |transform: &Transform, workers: usize| -> Vec<Loaded> {
        let loader = Loader::new(Arc::new(Numbers { bad, ..numbers(50) }), transform.clone(), shuffled(6, workers));
        (0..2).flat_map(|at| loader.epoch(at, 0).map(Result::unwrap).collect::<Vec<_>>()).collect()
    };
    let (whole, alone, plain) = (epoch(&both, 0), epoch(&jittered, 3), epoch(&cut, 2));
    assert_eq!((whole.len(), alone.len(), plain.len()), (16, 16, 16));
    for workers in [1, 4] {
        assert!(epoch(&both, workers).iter().map(views).eq(whole.iter().map(views)), "{workers} workers");
    }
    let mut same = 0;
    for ((both, alone), plain) in whole.iter().zip(&alone).zip(&plain) {
        let [clean, coloured] = views(both);
        assert_eq!((coloured.as_slice(), alone.clean.is_none()), (alone.bytes.data::<u8>(), true));
        assert_eq!((clean.as_slice(), &both.indices), (plain.bytes.data::<u8>(), &plain.indices));
        same += usize::from(clean == coloured);
    }
    assert_eq!(same, 0);
}

#[test]
fn a_teacher_is_fed_the_clean_view_with_labels_and_without() {
    let transform = Transform { clean: true, ..Transform::mae_pretrain(SIDE).two_views(0.4).unwrap() };
    let load = || Loader::new(Arc::new(numbers(12)), transform.clone(), shuffled(4, 0)).epoch(0, 0).next().unwrap().unwrap();
    let (mean, std) = (vec![0.5, 0.25, 0.125], vec![0.25; 3]);
    let feed = |labels| Feed { device: Device::Cpu, mean: mean.clone(), std: std.clone(), labels, bytes: false };
    let mut draws = Rng::new(1).stream("mixing", 0);
    let normalised = |bytes: &[u8]| -> Vec<f32> {
        let image = |image: usize| (0..3).flat_map(move |c| (0..SIDE * SIDE).map(move |at| (image * SIDE * SIDE + at) * 3 + c));
        let level = |at: usize| (f32::from(bytes[at]) / 255.0 - mean[at % 3]) / std[at % 3];
        (0..4).flat_map(image).map(level).collect()
    };
    let plain = Mixing { smoothing: 0.0, ..Mixing::default() };
    for labels in [None, Some(Labels { classes: 11, mixing: plain, labelled: None })] {
        let batch = feed(labels).training(load(), &mut draws).unwrap();
        let [clean, coloured] = views(&load());
        assert_eq!(batch.for_teacher().data::<f32>(), normalised(&clean));
        assert_eq!(batch.images.data::<f32>(), normalised(&coloured));
        assert_eq!(batch.targets.is_some(), labels.is_some());
    }
    let mixed = feed(Some(Labels { classes: 11, mixing: Mixing { mixup: 0.8, ..plain }, labelled: None }));
    let error = mixed.training(load(), &mut draws).map(|_| ()).unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("--mixup"), "{error}");
    assert!(mixed.fits(&transform).is_err() && mixed.fits(&Transform::mae_pretrain(SIDE)).is_ok());
}

/// What each image of an epoch is seen as: by its number the key, the clean view and the coloured one.
fn seen(loader: &Loader, epoch: u64) -> BTreeMap<usize, (Option<u64>, [Vec<u8>; 2])> {
    let image = SIDE * SIDE * 3;
    let batches = loader.epoch(epoch, 0).map(Result::unwrap).collect::<Vec<_>>();
    let rows = batches.iter().flat_map(|loaded| {
        let [clean, coloured] = [loaded.clean.as_ref().unwrap_or(&loaded.bytes), &loaded.bytes].map(|view| view.data::<u8>());
        let views = clean.chunks_exact(image).zip(coloured.chunks_exact(image)).map(|(a, b)| [a.to_vec(), b.to_vec()]);
        loaded.indices.iter().copied().zip(loaded.keys.iter().copied().zip(views))
    });
    rows.collect()
}

#[test]
fn fixed_views_return_in_turn_whatever_the_order_of_the_epoch() {
    let views = |transform: &Transform, workers: usize| {
        let options = LoaderOptions { views: Some(3), ..shuffled(6, workers) };
        let loader = Loader::new(Arc::new(numbers(48)), transform.clone(), options);
        (0..6).map(|epoch| seen(&loader, epoch)).collect::<Vec<_>>()
    };
    let noisy = Some(Erasing::new(0.5, Filling::Pixel, 1).unwrap());
    let one = Transform { erasing: noisy, ..Transform::finetune(SIDE, None, Some(0.4), None).unwrap() };
    let two = Transform::mae_pretrain(SIDE).two_views(0.4).unwrap();
    for transform in [one, two] {
        let epochs = views(&transform, 0);
        assert!(views(&transform, 3) == epochs, "workers change a view");
        for (epoch, seen) in epochs.iter().enumerate() {
            assert!(seen.iter().all(|(index, (key, _))| *key == Some(((epoch % 3) * 48 + index) as u64)) && seen.len() == 48);
            for (other, later) in epochs.iter().enumerate().skip(epoch + 1) {
                let same = |which: usize| seen.iter().filter(|(index, (_, views))| views[which] == later[index].1[which]).count();
                let again = (other - epoch) % 3 == 0;
                assert!(if again { same(0) == 48 } else { same(0) < 8 }, "epochs {epoch} and {other}: {} clean views are alike", same(0));
                // What only the student sees is new in every epoch.
                assert!(if again && !transform.clean { same(1) == 48 } else { same(1) < 8 }, "epochs {epoch} and {other}: {}", same(1));
            }
        }
    }
    let new = Loader::new(Arc::new(numbers(48)), Transform::mae_pretrain(SIDE), shuffled(6, 0));
    assert!(seen(&new, 0).values().all(|(key, _)| key.is_none()));
}

#[test]
fn what_stands_in_for_another_image_is_no_view_of_its_own() {
    let options = LoaderOptions { views: Some(2), ..shuffled(5, 2) };
    let loader = Loader::new(Arc::new(Numbers { bad, ..numbers(60) }), Transform::mae_pretrain(SIDE), options);
    let count = |epoch| {
        let keys: Vec<_> = loader.epoch(epoch, 0).flat_map(|loaded| loaded.unwrap().keys).collect();
        let distinct: BTreeSet<_> = keys.iter().flatten().map(|key| key % 60).collect();
        assert!(distinct.iter().all(|&index| !bad(index as usize)));
        (keys.len(), keys.iter().flatten().count(), distinct.len())
    };
    let good = (0..60).filter(|&index| !bad(index)).count();
    assert_eq!((count(0), count(1)), ((60, good, good), (60, good, good)));
}

#[test]
fn fixed_views_that_cannot_be_meant_are_refused() {
    for (views, order, part) in [
        (0, Order::Shuffled, "--views 0"),
        (u64::MAX, Order::Shuffled, "1 to 4294967296"),
        (2, Order::Repeated { times: 3 }, "--repeated-aug"),
    ] {
        let loader = loader(numbers(12), LoaderOptions { order, views: Some(views), ..shuffled(4, 0) });
        let first = loader.epoch(0, 0).next().unwrap().map(|_| ()).unwrap_err();
        for error in [loader.check().unwrap_err(), first] {
            assert!(error.exit_code() == 2 && error.to_string().contains(part), "{error}");
        }
    }
}

#[test]
fn an_epoch_from_its_middle_is_the_tail_of_the_whole() {
    for workers in [0, 3] {
        for order in [Order::Shuffled, Order::Sequential] {
            let loader = loader(Numbers { bad, ..numbers(40) }, LoaderOptions { order, ..shuffled(6, workers) });
            let whole = epoch(&loader, 2, 0);
            for first in [1, 3, loader.batches() - 1, loader.batches(), loader.batches() + 1, usize::MAX] {
                assert_eq!(epoch(&loader, 2, first), whole[first.min(whole.len())..], "from {first}, {workers} workers");
            }
        }
    }
}

#[test]
fn in_training_another_image_with_its_own_label_stands_in_for_one_that_cannot_be_read() {
    let loader = loader(Numbers { bad, ..numbers(60) }, shuffled(10, 3));
    let mut seen = vec![0; 60];
    for (bytes, labels, indices) in epoch(&loader, 0, 0) {
        assert_eq!((bytes.len(), labels.len()), (10 * SIDE * SIDE * 3, 10));
        for ((image, label), index) in bytes.chunks_exact(SIDE * SIDE * 3).zip(labels).zip(indices) {
            assert!(!bad(index) && label == label_of(index));
            // A flip moves pixels within their row.
            let row = |image: &mut dyn Iterator<Item = u8>| {
                let mut row: Vec<u8> = image.collect();
                row.sort_unstable();
                row
            };
            let wanted = row(&mut (0..SIDE * 3).map(|at| pixel_of(index, at)));
            assert_eq!(row(&mut image[..SIDE * 3].iter().copied()), wanted);
            seen[index] += 1;
        }
    }
    assert!((0..60).all(|index| bad(index) == (seen[index] == 0)) && seen.iter().sum::<i32>() == 60, "{seen:?}");
    let skipped = loader.skipped();
    assert_eq!(skipped.count, (0..60).filter(|&index| bad(index)).count());
    assert!(skipped.names.len() == skipped.count && skipped.names.iter().all(|name| name.ends_with("it is torn")), "{skipped:?}");
    epoch(&loader, 1, 0);
    assert_eq!(loader.skipped().count, skipped.count, "an image is counted once, however often it is met");
}

#[test]
fn in_evaluation_what_cannot_be_read_is_left_out() {
    // Two whole batches of four are torn.
    let torn = |index: usize| bad(index) || (8..16).contains(&index);
    let loader = loader(Numbers { bad: torn, ..numbers(46) }, sequential(4, 2));
    let batches = epoch(&loader, 0, 0);
    assert_eq!(batches.len(), loader.batches() - 2);
    let mut indices = Vec::new();
    for (bytes, labels, of) in batches {
        let wanted: Vec<u8> = of.iter().flat_map(|&index| (0..SIDE * SIDE * 3).map(move |at| pixel_of(index, at))).collect();
        assert_eq!((bytes, labels), (wanted, of.iter().map(|&index| label_of(index)).collect::<Vec<_>>()));
        indices.extend(of);
    }
    assert_eq!(indices, (0..46).filter(|&index| !torn(index)).collect::<Vec<_>>());
    let skipped = loader.skipped();
    assert_eq!((skipped.count, skipped.names.len()), (12, 10));
    assert_eq!(skipped.names[0], "number 4: it is torn");
}

#[test]
fn strictly_the_first_unreadable_image_is_the_error() {
    for workers in [0, 1, 4] {
        let loader = loader(Numbers { bad, ..numbers(60) }, LoaderOptions { strict: true, ..sequential(3, workers) });
        let all: Vec<Result<Loaded>> = loader.epoch(0, 0).collect();
        assert_eq!(all.len(), 2, "nothing comes after an error");
        let error = all[1].as_ref().map(|_| ()).unwrap_err();
        assert_eq!((error.chain().as_str(), error.exit_code()), ("number 4: it is torn", 1));
    }
}

#[test]
fn a_set_of_which_most_cannot_be_read_is_an_error() {
    let most = |index: usize| !index.is_multiple_of(5);
    for (len, order) in [(400, Order::Shuffled), (400, Order::Sequential), (7, Order::Sequential), (3, Order::Shuffled)] {
        let options = LoaderOptions { order, batch: 2, ..shuffled(2, 2) };
        let loader = loader(Numbers { bad: most, ..numbers(len) }, options);
        let result: Result<Vec<Loaded>> = (0..3).flat_map(|at| loader.epoch(at, 0)).collect();
        let chain = result.map(|_| ()).unwrap_err().chain();
        assert!(chain.contains("cannot be read") && chain.contains("it is torn"), "{len} {order:?}: {chain}");
    }
    // A little less than half is a matter for a warning.
    let loader = loader(Numbers { bad: |index| index % 5 < 2, ..numbers(400) }, sequential(10, 2));
    assert_eq!(epoch(&loader, 0, 0).len(), 40);
    assert_eq!((loader.skipped().count, loader.skipped().names.len()), (160, 10));
}

#[test]
fn a_panic_of_a_worker_is_an_error_that_names_the_image() {
    for workers in [0, 1, 3] {
        let loader = loader(Numbers { panics: |index| index == 11, ..numbers(30) }, sequential(4, workers));
        let all: Vec<Result<Loaded>> = loader.epoch(0, 0).collect();
        assert_eq!(all.len(), 3);
        let chain = all[2].as_ref().map(|_| ()).unwrap_err().chain();
        assert!(chain.starts_with("number 11: ") && chain.ends_with("no picture of 11"), "{chain}");
    }
}

#[test]
fn images_of_another_number_of_channels_are_an_error() {
    for workers in [0, 2] {
        let loader = loader(Numbers { channels: |index| 1 + index / 6 % 2, ..numbers(12) }, sequential(4, workers));
        let all: Vec<Result<Loaded>> = loader.epoch(0, 0).collect();
        assert_eq!(all[0].as_ref().unwrap().bytes.shape(), [4, SIDE, SIDE, 1]);
        let chain = all[1].as_ref().map(|_| ()).unwrap_err().chain();
        assert!(all.len() == 2 && chain.contains("channel"), "{chain}");
    }
}

#[test]
fn workers_fill_a_bounded_number_of_batches_ahead_and_end_with_the_epoch() {
    let set = Arc::new(numbers(1000));
    let loader = Loader::new(set.clone(), transform(true, None), shuffled(8, 3));
    let handles = Arc::strong_count(&set);
    let mut batches = loader.epoch(0, 0);
    batches.next().unwrap().unwrap();
    let (start, ahead) = (Instant::now(), 8 * (1 + 2));
    while set.read.load(Ordering::SeqCst) < ahead && start.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(set.read.load(Ordering::SeqCst), ahead);
    batches.next().unwrap().unwrap();
    drop(batches);
    assert_eq!(Arc::strong_count(&set), handles, "threads outlive their epoch");
    assert!(set.read.load(Ordering::SeqCst) <= ahead + 8);
}

#[test]
fn empty_sets_and_batches_of_nothing_are_no_panic() {
    for workers in [0, 2] {
        for order in [Order::Shuffled, Order::Sequential] {
            let empty = loader(numbers(0), LoaderOptions { order, ..shuffled(4, workers) });
            assert_eq!((empty.batches(), epoch(&empty, 0, 0).len()), (0, 0));
            let none = loader(numbers(10), LoaderOptions { order, ..shuffled(0, workers) });
            let mut batches = none.epoch(0, 0);
            assert_eq!(batches.next().unwrap().map(|_| ()).unwrap_err().exit_code(), 2);
            assert!(batches.next().is_none());
        }
    }
}

#[test]
fn ranks_share_an_epoch_and_draw_apart() {
    let part = |rank: usize| {
        let options = LoaderOptions { order: Order::Repeated { times: 3 }, rank, ranks: 3, ..shuffled(5, 1) };
        epoch(&loader(numbers(90), options), 0, 0)
    };
    let parts = [part(0), part(1), part(2)];
    // The copies of an image are on different ranks, and are not all mirrored alike.
    assert!((0..parts[0].len()).all(|at| parts.iter().all(|part| part[at].2 == parts[0][at].2)));
    assert_ne!(parts[0], parts[1]);
    assert_ne!(parts[1], parts[2]);
}

/// Normalised images with mean 1/2 and deviation 1/2, and the boxes that were erased.
fn erased(mode: Filling, workers: usize) -> Vec<(Vec<f64>, Vec<u32>)> {
    let erasing = Erasing::new(0.7, mode, 2).unwrap();
    let loader = Loader::new(Arc::new(Numbers { bad, ..numbers(40) }), transform(false, Some(erasing)), sequential(7, workers));
    let batches = loader.epoch(0, 0).map(|loaded| {
        let loaded = loaded.unwrap();
        let images = loaded.images(&Device::Cpu, &[0.5; 3], &[0.5; 3], &augment::Augment::default()).unwrap();
        let erase = loaded.erase.unwrap();
        let (count, sample) = (loaded.indices.len(), [SIDE, SIDE]);
        assert_eq!(erase.boxes.shape(), [count, 2, 4]);
        match (mode, &erase.fill) {
            (Filling::Const, Filled::Zero) => {}
            (Filling::Rand, Filled::Channels(fill)) => assert_eq!(fill.shape(), [count, 2, 3]),
            (Filling::Pixel, Filled::Pixels(fill)) => assert_eq!(fill.shape(), [count, 3, sample[0], sample[1]]),
            _ => panic!("{mode:?} is filled with something else"),
        }
        (images.to_f64(), erase.boxes.data::<u32>().to_vec())
    });
    batches.collect()
}

#[test]
fn boxes_are_erased_with_numbers_of_the_sample_s_own() {
    for mode in [Filling::Const, Filling::Rand, Filling::Pixel] {
        let one = erased(mode, 1);
        for workers in [0, 3] {
            assert_eq!(erased(mode, workers), one, "{mode:?}, {workers} workers");
        }
        let good: Vec<usize> = (0..40).filter(|&index| !bad(index)).collect();
        let images = one.iter().flat_map(|(images, _)| images.chunks_exact(3 * SIDE * SIDE));
        let boxes = one.iter().flat_map(|(_, boxes)| boxes.chunks_exact(8));
        let (mut inside, mut colours) = (Vec::new(), 0);
        for ((image, boxes), index) in images.zip(boxes).zip(good) {
            let is_in = |y: usize, x: usize, b: &[u32]| {
                let [top, left, height, width] = std::array::from_fn(|i| b[i] as usize);
                (top..top + height).contains(&y) && (left..left + width).contains(&x)
            };
            let mut seen = [false; 2];
            for (at, &value) in image.iter().enumerate() {
                let (c, y, x) = (at / SIDE / SIDE, at / SIDE % SIDE, at % SIDE);
                let byte = pixel_of(index, (y * SIDE + x) * 3 + c);
                // The last box is on top.
                match boxes.chunks_exact(4).rposition(|b| is_in(y, x, b)) {
                    None => assert!((value - (f64::from(byte) / 127.5 - 1.0)).abs() < 1e-6),
                    Some(top) => {
                        inside.push(value);
                        seen[top] = true;
                    }
                }
            }
            colours += seen.iter().filter(|&&seen| seen).count();
        }
        assert!(inside.len() > 300, "{}", inside.len());
        let mut distinct = inside.clone();
        distinct.sort_by(f64::total_cmp);
        distinct.dedup();
        let mean = inside.iter().sum::<f64>() / inside.len() as f64;
        match mode {
            Filling::Const => assert_eq!(distinct, [0.0]),
            Filling::Rand => assert_eq!(distinct.len(), 3 * colours),
            Filling::Pixel => assert!(distinct.len() == inside.len() && mean.abs() < 0.2, "{mean}"),
        }
    }
}
