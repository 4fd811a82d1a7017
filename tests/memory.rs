//! A training step in steady state asks the system for nothing.

use masque::device::memory::taken_from_system;
use masque::methods::mae::{Mae, MaeConfig};
use masque::methods::teacher::{Network, Teacher};
use masque::methods::{Batch, Method};
use masque::nn::decoder::DecoderConfig;
use masque::nn::vit::{Tokens, Vit, VitConfig};
use masque::nn::{Scope, Start};
use masque::optim::{Optimizer, adamw::AdamW, groups};
use masque::param::ParamsBuilder;
use masque::rng::Rng;
use masque::tape::Tape;
use masque::tensor::{Dtype, Tensor};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

struct Counting;

const LARGE: usize = 64 * 1024;
static LARGE_REQUESTS: AtomicUsize = AtomicUsize::new(0);

fn count(bytes: usize) {
    if bytes >= LARGE {
        LARGE_REQUESTS.fetch_add(1, Relaxed);
    }
}

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size);
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What the pool took and how many large requests there were in five steps after three; and all that the pool has taken.
fn five_steps() -> ((usize, usize), usize, usize) {
    let rng = Rng::new(3);
    let encoder = VitConfig::new(64, 8, 96, 2, 4);
    let decoder = DecoderConfig { width: 64, depth: 1, heads: 4 };
    let mut mae = Mae::new(MaeConfig { encoder, decoder, mask_ratio: 0.75, norm_pix: Some(1e-6) }, Dtype::F32, &rng).unwrap();
    let mut adamw = AdamW::new(groups::by_decay(&mae.params, 0.05, &[]), (0.9, 0.95), 1e-8).unwrap();
    let images = Tensor::from_slice(&[8, 3, 64, 64], &rng.normal("images", 8 * 3 * 64 * 64)).unwrap();
    let batch = Batch::of_images(images);
    let mut step = |i: u64| {
        let tape = Tape::new();
        let loss = mae.loss(&tape, &batch, &rng.at(i)).unwrap();
        mae.params.clear_gradients();
        tape.backward(&loss.total, &mut [&mut mae.params]).unwrap();
        adamw.step(&mut mae.params, 1e-3).unwrap();
    };
    (0..3).for_each(&mut step);
    let (before, large) = (taken_from_system(), LARGE_REQUESTS.load(Relaxed));
    (3..8).for_each(&mut step);
    let after = taken_from_system();
    ((after.0 - before.0, after.1 - before.1), LARGE_REQUESTS.load(Relaxed) - large, after.0)
}

/// What the pool takes for a pass over 8 images, on a tape or off it, of a teacher so deep; the pool may not have been filled by anything larger.
fn pass(depth: usize, on_tape: bool) -> usize {
    let mut b = ParamsBuilder::default();
    let config = VitConfig::new(256, 8, 64, depth, 4);
    let tokens = Tokens::new(&mut b, &config).unwrap();
    let vit = Vit::new(&mut b, config, tokens, true, Start::Xavier).unwrap();
    let teacher = Teacher::new("a teacher", b.build(Dtype::F32, &Rng::new(0)).unwrap(), Network::Encoder(vit));
    let images = Tensor::from_slice(&[8, 3, 256, 256], &Rng::new(1).normal("images", 8 * 3 * 256 * 256)).unwrap();
    let before = taken_from_system().0;
    if on_tape {
        let tape = Tape::new();
        teacher.encoder().unwrap().forward(&Scope::new(&tape, &teacher.params), &images, None).unwrap();
    } else {
        teacher.features(&images, None, &[depth - 1]).unwrap();
    }
    taken_from_system().0 - before
}

/// One test, because the counters belong to the whole process.
#[test]
fn a_step_in_steady_state_takes_nothing_from_the_system() {
    let with = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(five_steps);
    let (grown, large, one) = with(1);
    assert_eq!(grown, (0, 0), "the pool took (bytes, blocks)");
    assert_eq!(large, 0, "requests of {LARGE} bytes and more");
    // How many threads hold scratch memory at once depends on their timing: the pool may still grow a little, but it stays bounded.
    let (grown, large, both) = with(2);
    assert!(large <= grown.1, "{large} large requests, of which {} by the pool", grown.1);
    assert!(both <= 2 * one, "two threads took {both} bytes where one took {one}");
    // A teacher's pass keeps nothing of its blocks: ten need what two need. On a tape each of them would stay.
    let shallow = pass(2, false);
    let (deep, kept) = (pass(10, false), pass(10, true));
    assert!(shallow > 0 && deep * 10 < shallow, "10 blocks took {deep} bytes more than the {shallow} of 2");
    assert!(kept > 4 * shallow, "on a tape 10 blocks took only {kept} bytes more than {shallow}");
}
