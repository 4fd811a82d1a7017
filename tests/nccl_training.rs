//! Steps of MAE whose gradients go from GPU to GPU: on the stand-in two ranks are two threads, each on a device of its own; on a real GPU one rank is a group of one.
//! What one rank does on the CPU with all the images is what they have to do together.

mod stand_in;

use masque::device::Named;
use masque::device::gpu::Gpu;
use masque::device::ranks::{Ranks, Wire};
use masque::device::real::Nccl;
use masque::methods::Batch;
use masque::methods::mae::{Mae, MaeConfig};
use masque::nn::decoder::DecoderConfig;
use masque::nn::vit::{DropPath, VitConfig};
use masque::optim::{adamw::AdamW, groups};
use masque::rng::Rng;
use masque::tensor::{Device, Dtype, Tensor};
use masque::train::exchange::{ExchangeOptions, Way};
use masque::train::step::{Step, StepOptions};
use std::time::Duration;

/// Two updates as they come, then recorded ones.
const UPDATES: u64 = 5;
/// Images of a micro-batch of all ranks.
const IMAGES: usize = 4;
const PIXELS: usize = 3 * 32 * 32;

/// `seed`: of the weights; ranks begin with those of rank 0.
fn mae(device: &Device, seed: u64) -> Mae {
    let encoder = VitConfig { drop_path: DropPath::Linear(0.3), ..VitConfig::new(32, 8, 32, 2, 2) };
    let decoder = DecoderConfig { width: 32, depth: 1, heads: 2 };
    let mut mae = Mae::new(MaeConfig { encoder, decoder, mask_ratio: 0.75, norm_pix: Some(1e-6) }, Dtype::F32, &Rng::new(seed)).unwrap();
    mae.params.move_to(device, Dtype::F32).unwrap();
    mae
}

/// The images of one rank of so many.
fn batch(micro: u64, rank: usize, world: usize) -> Batch {
    let all = Rng::new(2).at(micro).normal("images", IMAGES * PIXELS);
    let own: Vec<f32> = all.chunks(PIXELS).skip(rank).step_by(world).flatten().copied().collect();
    Batch::of_images(Tensor::from_slice(&[IMAGES / world, 3, 32, 32], &own).unwrap())
}

struct Done {
    losses: Vec<f64>,
    norms: Vec<f64>,
    values: Vec<f64>,
    recorded: bool,
}

fn train(device: &Device, ranks: &Ranks, options: ExchangeOptions, step: StepOptions) -> Done {
    let mae = mae(device, ranks.rank() as u64);
    let optimizer = AdamW::new(groups::by_decay(&mae.params, 0.05, &[]), (0.9, 0.95), 1e-8).unwrap();
    let made = Step::new(Box::new(mae), Box::new(optimizer), step).with_ranks(ranks, options);
    let mut own = made.unwrap_or_else(|error| panic!("{}", error.chain()));
    let (mut losses, mut norms) = (Vec::new(), Vec::new());
    for update in 0..UPDATES {
        for micro in (update * step.accumulate as u64..).take(step.accumulate) {
            let rng = Rng::new(7).of_share(ranks.rank(), ranks.world()).at(micro);
            own.add(&batch(micro, ranks.rank(), ranks.world()), &rng).unwrap_or_else(|error| panic!("{}", error.chain()));
        }
        let outcome = own.finish(1e-3 * (1.0 + update as f64)).unwrap_or_else(|error| panic!("{}", error.chain()));
        losses.push(outcome.loss);
        norms.push(outcome.norm);
    }
    own.check_sync(UPDATES).unwrap();
    let recorded = own.is_recorded();
    let params = own.method().params();
    let values = params.ids().flat_map(|id| params.value(id).read().unwrap()).collect();
    Done { losses, norms, values, recorded }
}

fn near(got: &[f64], want: &[f64], limit: f64, what: &str) {
    let worst = got.iter().zip(want).map(|(got, want)| (got - want).abs() / want.abs().max(0.1)).fold(0.0, f64::max);
    assert!(got.len() == want.len() && worst <= limit, "{what}: {worst:e}, {:?} and {:?} ..", &got[..5], &want[..5]);
}

#[cfg(feature = "emulated")]
#[test]
fn the_stand_in_is_used() {
    stand_in::run("two_gpus_train_as_one_rank_does", "", None);
    stand_in::run("a_group_of_one_trains_as_nobody_else_does", "", None);
    stand_in::run("ranks_take_the_gpus_of_their_machine_in_turn_and_may_share_one_through_the_host", "", None);
    stand_in::run("what_waits_for_a_lost_rank_ends_with_its_name", "nccl-hangs", None);
}

/// Small buckets, so that several go while the pass is on.
fn options(wire: Wire, shard: bool) -> ExchangeOptions {
    ExchangeOptions { wire, shard, bucket: 20_000, patience: Duration::from_secs(60), ..ExchangeOptions::default() }
}

#[test]
fn two_gpus_train_as_one_rank_does() {
    if !stand_in::enter() {
        return;
    }
    for (accumulate, clip) in [(1, None), (2, Some(0.5))] {
        let step = StepOptions { accumulate, clip };
        let one = train(&Device::Cpu, &Ranks::alone(), ExchangeOptions::default(), step);
        for (wire, shard, limit) in [(Wire::F32, false, 2e-5), (Wire::F32, true, 2e-5), (Wire::Bf16, false, 2e-2), (Wire::Bf16, true, 2e-2)]
        {
            let ranks = Ranks::threads(2, Duration::from_secs(60));
            let both: Vec<Done> = std::thread::scope(|scope| {
                let threads: Vec<_> = ranks
                    .iter()
                    .map(|ranks| {
                        scope.spawn(move || {
                            let gpu = Gpu::cuda(ranks.rank()).unwrap();
                            gpu.poison(true);
                            train(&Device::Gpu(gpu), ranks, options(wire, shard), step)
                        })
                    })
                    .collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            let what = format!("{wire}, sharded {shard}, {accumulate} micro-batches");
            for own in &both {
                assert!(own.recorded);
                near(&own.losses, &one.losses, limit, &format!("losses in {what}"));
                near(&own.norms, &one.norms, 10.0 * limit, &format!("norms in {what}"));
                assert!(own.values == both[0].values && own.losses == both[0].losses, "{what}");
            }
            if wire == Wire::F32 {
                // Where a gradient is nothing but rounding, as that of a key's bias, AdamW makes a step of it: few differ, and those do.
                let off = both[0].values.iter().zip(&one.values).filter(|(own, one)| (**own - **one).abs() > 1e-5).count();
                assert!(off * 50 < one.values.len(), "{what}: {off} of {} values differ", one.values.len());
            }
        }
    }
}

#[test]
fn ranks_take_the_gpus_of_their_machine_in_turn_and_may_share_one_through_the_host() {
    if !stand_in::enter() {
        return;
    }
    let ranks = Ranks::threads(3, Duration::from_secs(60));
    let taken: Vec<String> = ranks.iter().map(|ranks| ranks.device(Named::Gpu(0)).unwrap().to_string()).collect();
    assert_eq!(taken, ["gpu:0", "gpu:1", "gpu:0"]);
    assert!(
        ranks[0].device(Named::Gpu(1)).unwrap_err().chain().contains("--device gpu:1: of several ranks each takes the GPU with its number")
    );
    let shared = |way: Way| {
        let ranks = Ranks::threads(2, Duration::from_secs(60));
        let gpu = Gpu::cuda(0).unwrap();
        let run = |own: &Ranks| {
            let mae = mae(&Device::Gpu(gpu.clone()), 0);
            let optimizer = AdamW::new(groups::by_decay(&mae.params, 0.05, &[]), (0.9, 0.95), 1e-8).unwrap();
            let step = Step::new(Box::new(mae), Box::new(optimizer), StepOptions::default());
            let joined = step.with_ranks(own, ExchangeOptions { way, ..options(Wire::F32, false) });
            joined.map(drop).map_err(|error| error.chain())
        };
        std::thread::scope(|scope| {
            let both: Vec<_> = ranks.iter().map(|own| scope.spawn(|| run(own))).collect();
            both.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        })
    };
    assert_eq!(shared(Way::Host), [Ok(()), Ok(())]);
    let said = shared(Way::Nccl);
    assert!(
        said.iter().all(|said| said.as_ref().unwrap_err().contains("is used by ranks 0 and 1, and NCCL needs one for each rank")),
        "{said:?}"
    );
}

#[test]
fn a_group_of_one_trains_as_nobody_else_does() {
    stand_in::enter();
    let gpu = match Gpu::cuda(0).and_then(|gpu| Nccl::id().map(|_| gpu)) {
        Ok(gpu) => gpu,
        Err(error) => return println!("not run: no GPU with NCCL: {}", error.chain()),
    };
    let device = Device::Gpu(gpu);
    let step = StepOptions { clip: Some(0.5), ..StepOptions::default() };
    let alone = train(&device, &Ranks::alone(), ExchangeOptions::default(), step);
    for (wire, shard, limit) in [(Wire::F32, false, 0.0), (Wire::F32, true, 1e-6), (Wire::Bf16, false, 2e-2)] {
        let group = Ranks::threads(1, Duration::from_secs(60)).pop().unwrap();
        let own = train(&device, &group, options(wire, shard), step);
        assert!(own.recorded && alone.recorded);
        near(&own.losses, &alone.losses, limit, &format!("losses in {wire}, sharded {shard}"));
        near(&own.norms, &alone.norms, 10.0 * limit, &format!("norms in {wire}, sharded {shard}"));
    }
}

#[test]
fn what_waits_for_a_lost_rank_ends_with_its_name() {
    if !stand_in::enter() {
        return;
    }
    let ranks = Ranks::threads(2, Duration::from_secs(60));
    let join = |ranks: &Ranks| {
        let device = Device::Gpu(Gpu::cuda(ranks.rank()).unwrap());
        let mae = mae(&device, 0);
        let optimizer = AdamW::new(groups::by_decay(&mae.params, 0.05, &[]), (0.9, 0.95), 1e-8).unwrap();
        let step = Step::new(Box::new(mae), Box::new(optimizer), StepOptions::default());
        step.with_ranks(ranks, options(Wire::F32, false)).map(drop).unwrap_err().chain()
    };
    std::thread::scope(|scope| {
        let both: Vec<_> = ranks.iter().map(|ranks| scope.spawn(move || join(ranks))).collect();
        std::thread::sleep(Duration::from_millis(1500));
        ranks[1].fail(&masque::error::Error::new("its disk is full"));
        for thread in both {
            let said = thread.join().unwrap();
            assert!(said.contains("rank 1 failed: its disk is full"), "{said}");
        }
    });
}
