//! Several ranks that train one model do what one rank does with all their images. Here they are threads of one process.

#[path = "common/runs.rs"]
mod runs;
#[path = "common/together.rs"]
mod together;

use clap::Parser;
use masque::device::ranks::environment::Launched;
use masque::device::ranks::{Ranks, Wire};
use masque::error::{Error, Result};
use masque::methods::{Batch, Loss, Method};
use masque::nn::vit::Vit;
use masque::ops::batchnorm::Statistics;
use masque::optim::groups::LayerDecay;
use masque::optim::sgd::Sgd;
use masque::param::{Init, ParamId, Params, ParamsBuilder, Role};
use masque::rng::Rng;
use masque::tape::{Tape, Var};
use masque::tensor::{Dtype, Tensor};
use masque::train::evaluate::{EvaluateArgs, Evaluation};
use masque::train::exchange::ExchangeOptions;
use masque::train::step::{Step, StepOptions};
use runs::{checkpoints, folder, last_tensors, rows};
use std::path::Path;
use std::time::{Duration, Instant};
use together::{SYSTEMS, Taught, alone, apart, as_threads, checkpoint, few, losses, near, run_as, teachers, tensors, threads};

const PATIENCE: Duration = Duration::from_secs(60);

/// Trains with one rank, with 2 and with 4, on the same images, and compares.
fn match_one_rank(base: &Path, commands: &[(&str, &str, Taught)]) {
    let taught = teachers(base);
    for (name, command, by) in commands {
        let command = format!("{command} {} --save-freq 1", taught(*by));
        let one = base.join(format!("{name}-1"));
        alone(&few(&command, 1), &one);
        for world in [2, 4] {
            let own = base.join(format!("{name}-{world}"));
            as_threads(world, &few(&command, world), &own);
            near(&format!("{name} on {world} ranks"), &losses(&own), &losses(&one), 1e-5);
            let [log, of_one] = [&own, &one].map(|folder| rows(folder.join("log.jsonl")).remove(0));
            near(
                name,
                &["train_loss", "train_lr"].map(|key| log[key].as_f64().unwrap()),
                &["train_loss", "train_lr"].map(|key| of_one[key].as_f64().unwrap()),
                1e-5,
            );
            for beginning in ["model.", "ema."].into_iter().take(if command.contains("ema") { 2 } else { 1 }) {
                let apart = apart(&own, &one, beginning);
                assert!(apart < 1e-4, "{name} on {world} ranks: {beginning} {apart:e}");
            }
        }
    }
}

#[test]
fn the_five_systems_on_2_and_4_ranks_match_one_rank() {
    match_one_rank(&folder("ranks-systems"), &SYSTEMS);
}

#[test]
fn baselines_and_classifiers_on_2_and_4_ranks_match_one_rank() {
    let more = [
        ("maskfeat", "pretrain maskfeat", Taught::Alone),
        ("convmae", "pretrain convmae", Taught::Alone),
        ("dmjd-maskfeat", "pretrain dmjd --preset glyphs-dmjd-maskfeat --num-views 3", Taught::Alone),
        (
            "finetune",
            "finetune --model glyph_t --drop-path 0.2 --clip-grad 1 --accum-iter 2 --reprob 0.5 --aa rand-m9-mstd0.5-inc1",
            Taught::Alone,
        ),
        ("train", "train --mixup 0 --cutmix 0 --drop-path 0.1 --opt lamb", Taught::Alone),
    ];
    match_one_rank(&folder("ranks-others"), &more);
}

#[derive(Parser)]
struct Evaluate {
    #[command(flatten)]
    args: EvaluateArgs,
}

/// What each of so many ranks finds.
fn evaluated(checkpoint: &Path, images: usize, world: usize) -> Vec<Evaluation> {
    let own = |ranks: Ranks| {
        let words = format!("masque {} --batch-size 4 --val-images {images} --num-workers 0", checkpoint.display());
        let mut args = Evaluate::parse_from(words.split(' ')).args;
        args.ranks = ranks;
        args.run(&mut |_| {}).unwrap()
    };
    let all = if world == 1 { vec![Ranks::alone()] } else { Ranks::threads(world, PATIENCE) };
    std::thread::scope(|scope| {
        let threads: Vec<_> = all.into_iter().map(|ranks| scope.spawn(|| own(ranks))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn an_evaluation_by_ranks_is_to_the_last_bit_that_of_one() {
    let base = folder("ranks-evaluated");
    for command in ["finetune --model glyph_t", "pretrain mae --model glyph_t"] {
        let run = base.join(command.split(' ').next().unwrap());
        let wanted = few(command, 2).replace("--val-images 8", "--val-images 22");
        as_threads(3, &wanted, &run);
        let last = checkpoint(&run, checkpoints(&run).pop().unwrap());
        let one = evaluated(&last, 22, 1)[0];
        assert_eq!((one.images, one.accuracy.is_some()), (22, command.starts_with("finetune")));
        // What three ranks that trained found of the same parameters.
        let log = rows(run.join("log.jsonl")).remove(0);
        assert_eq!(log["test_loss"].as_f64(), Some(one.loss), "{command}");
        assert_eq!(log["test_acc1"].as_f64(), one.accuracy.map(|[first, _]| first), "{command}");
        for (images, world) in [(22, 2), (22, 3), (22, 9), (5, 4)] {
            let one = evaluated(&last, images, 1)[0];
            assert_eq!(evaluated(&last, images, world), vec![one; world], "{command}, {images} images on {world} ranks");
        }
    }
}

/// The length of a gradient is worked out from the lengths of the ranks' parts where they are sharded, rounded in other places.
#[track_caller]
fn all_near(what: &str, own: &Path, wanted: &Path) {
    let [own, wanted] = [own, wanted].map(|run| tensors(&checkpoint(run, checkpoints(run).pop().unwrap()), ""));
    assert!(own.keys().eq(wanted.keys()));
    for (name, wanted) in &wanted {
        let size = wanted.iter().fold(0f32, |most, x| most.max(x.abs()));
        let worst = own[name].iter().zip(wanted).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(worst <= 1e-6 * size.max(1e-3), "{what}: {name} {worst:e} of {size:e}");
    }
}

#[test]
fn a_sharded_optimiser_gives_the_bits_of_a_whole_one() {
    let base = folder("ranks-sharded");
    for (number, (command, world)) in [
        ("pretrain mae --model glyph_t --bucket-mb 0.01 --model-ema-decay 0.9", 4),
        ("finetune --model glyph_t --accum-iter 2", 2),
        ("probe --model glyph_t --lr 1", 2),
        ("train --opt lamb", 2),
    ]
    .into_iter()
    .enumerate()
    {
        let trained = |name: &str, more: &str| {
            let run = base.join(format!("{number}-{name}"));
            as_threads(world, &few(&format!("{command} {more}"), world), &run);
            run
        };
        let (whole, sharded) = (trained("whole", ""), trained("sharded", "--shard-optimizer"));
        assert!(last_tensors(&whole).iter().any(|(name, _)| name.starts_with("optimizer.")), "{command}");
        // LAMB clips by itself.
        assert!(command.contains("lamb") || last_tensors(&whole) == last_tensors(&sharded), "{command}");
        all_near(command, &sharded, &whole);
        let clipped = ["", "--shard-optimizer"].map(|more| trained(&format!("clipped{more}"), &format!("--clip-grad 0.1 {more}")));
        assert!(last_tensors(&clipped[0]) != last_tensors(&whole), "{command}: nothing was clipped");
        all_near(command, &clipped[1], &clipped[0]);
    }
}

#[test]
fn gradients_that_are_sent_in_bf16_train_as_well_and_leave_the_same_bits_everywhere() {
    let base = folder("ranks-bf16");
    let command = few("pretrain mae --model glyph_t --check-sync 1 --lr 1e-3", 2);
    as_threads(2, &command, &base.join("f32"));
    for (name, more) in [("bf16", ""), ("sharded", "--shard-optimizer")] {
        // Each update compares the ranks' parameters.
        as_threads(2, &format!("{command} --wire bf16 {more}"), &base.join(name));
        near(name, &losses(&base.join(name)), &losses(&base.join("f32")), 2e-2);
        assert!(losses(&base.join(name)) != losses(&base.join("f32")), "nothing was rounded");
    }
    assert!(last_tensors(&base.join("bf16")) == last_tensors(&base.join("sharded")));
}

#[test]
fn a_sharded_checkpoint_is_gone_on_with_by_any_number_of_ranks() {
    let base = folder("ranks-resumed");
    let command = "finetune --model glyph_t --save-updates 4 --epochs 2 --model-ema-decay 0.9";
    let whole = base.join("whole");
    let run = |world: usize, more: &str| format!("{} {more}", few(command, world).replace("--epochs 1", ""));
    as_threads(4, &run(4, "--shard-optimizer"), &whole);
    assert_eq!(losses(&whole).len(), 12);
    let ways =
        [(1, ""), (1, "--shard-optimizer"), (1, "--batch-size 2 --accum-iter 4"), (2, "--batch-size 2 --accum-iter 2 --shard-optimizer")];
    for (world, more) in ways.into_iter().chain([(2, "--shard-optimizer"), (2, ""), (4, ""), (4, "--shard-optimizer")]) {
        let own = base.join(format!("{world}{more}"));
        std::fs::create_dir_all(&own).unwrap();
        std::fs::copy(checkpoint(&whole, 4), checkpoint(&own, 4)).unwrap();
        std::fs::copy(whole.join("steps.jsonl"), own.join("steps.jsonl")).unwrap();
        let command = run(world, &format!("{more} --resume auto"));
        if world == 1 {
            alone(&command, &own)
        } else {
            as_threads(world, &command, &own)
        }
        near(&format!("{world} ranks {more}"), &losses(&own), &losses(&whole), 1e-4);
        assert_eq!(last_tensors(&own) == last_tensors(&whole), world == 4, "{world} ranks {more}");
    }
}

#[test]
fn ranks_skip_and_go_back_together_and_all_end_with_the_sentence_of_one() {
    let base = folder("ranks-exploding");
    let command = |batch: usize| {
        format!(
            "pretrain mae --model glyph_t --train-images 640 --val-images 8 --batch-size {batch} --epochs 1 --lr 1e36 --warmup-epochs 0 --max-skips 2 \
             --save-updates 1 --num-workers 0"
        )
    };
    let one = run_as(&command(4), &base.join("one"), &Ranks::alone()).unwrap_err();
    assert!(one.1.contains("skipped because loss or gradient were not finite") && one.1.contains("try a smaller --lr"), "{one:?}");
    for shard in ["", "--shard-optimizer"] {
        let own = base.join(format!("two{shard}"));
        let both = threads(2, |_| format!("{} {shard}", command(2)), &own);
        assert!(both.iter().all(|ended| ended.as_ref().unwrap_err().1.ends_with(&one.1)), "{both:?}");
        let notes = |folder: &Path| rows(folder.join("notes.jsonl")).iter().map(|row| row["update"].clone()).collect::<Vec<_>>();
        assert_eq!(notes(&own), notes(&base.join("one")), "{shard}");
    }
}

#[test]
fn ranks_fill_one_cache_of_a_teacher_and_read_it_whoever_wrote() {
    let base = folder("ranks-cache");
    let teacher = teachers(&base)(Taught::ByEncoder);
    // Each epoch is another order: what a rank asks for in the second half another may have written in the first.
    let run = |more: &str| format!("{} --epochs 4", few(&format!("pretrain tinymim {teacher} --views 2{more}"), 2));
    let (without, with) = (base.join("without"), base.join("with"));
    as_threads(2, &run(""), &without);
    as_threads(2, &run(&format!(" --teacher-cache {}", base.join("cache").display())), &with);
    let asked: Vec<f64> = rows(with.join("log.jsonl")).iter().map(|row| row["teacher_flops_per_image"].as_f64().unwrap()).collect();
    assert!(asked[0] > 0.0 && asked[1] > 0.0 && asked[2..] == [0.0; 2], "{asked:?}");
    assert_eq!(losses(&with), losses(&without));
}

#[test]
fn every_rank_sees_as_many_images_where_they_do_not_divide() {
    let base = folder("ranks-uneven");
    for (command, updates) in [("train", 16 / 2), ("finetune --model glyph_t", 17 / 2)] {
        let run = base.join(command.split(' ').next().unwrap());
        let command = format!("{command} --train-images 50 --val-images 7 --batch-size 2 --epochs 2 --log-freq 1 --num-workers 0");
        as_threads(3, &command, &run);
        let log = rows(run.join("log.jsonl"));
        assert_eq!([0, 1].map(|epoch| log[epoch]["update"].as_u64().unwrap()), [updates, 2 * updates], "{command}");
        assert_eq!(losses(&run).len() as u64, 2 * updates);
        let page = std::fs::read_to_string(run.join("report.html")).unwrap();
        assert!(page.contains(&format!("{} updates of 6 images by 3 ranks", 2 * updates)), "{command}");
    }
}

#[cfg(feature = "emulated")]
#[test]
fn ranks_on_the_emulated_device_have_the_losses_of_the_cpu() {
    let base = folder("ranks-emulated");
    for (name, method) in [
        ("plain", "pretrain mae --model glyph_t"),
        ("sharded", "pretrain mae --model glyph_t --shard-optimizer --clip-grad 1"),
        ("lamb", "train --opt lamb --mixup 0 --cutmix 0 --shard-optimizer --bucket-mb 0.02"),
    ] {
        let command = format!(
            "{method} --train-images 16 --val-images 4 --batch-size 2 --epochs 1 --log-freq 1 --warmup-epochs 0 --lr 1e-3 --num-workers 0"
        );
        let [cpu, emulated] = ["cpu", "emulated"].map(|device| {
            let run = base.join(format!("{device}-{name}"));
            as_threads(2, &format!("{command} --device {device}"), &run);
            losses(&run)
        });
        near(name, &emulated, &cpu, 2e-4);
    }
}

/// Images through one normalised layer: it has weights, and running statistics.
struct Layer {
    params: Params,
    weight: ParamId,
    mean: ParamId,
}

impl Layer {
    fn step(ranks: &Ranks) -> Step {
        let mut builder = ParamsBuilder::default();
        let weight = builder.add("weight", &[5, 12], Init::Normal(0.3)).unwrap();
        let mean = builder.add_as("mean", &[5], Init::Constant(0.0), Role::Buffer).unwrap();
        let params = builder.build(Dtype::F32, &Rng::new(1)).unwrap();
        let groups = LayerDecay { weight_decay: 0.0, decay: 1.0, last: 1, no_decay: &[] }.groups(&params, |_| Ok(0)).unwrap();
        let step = Step::new(Box::new(Self { params, weight, mean }), Box::new(Sgd::new(groups, 0.9).unwrap()), StepOptions::default());
        step.with_ranks(ranks, ExchangeOptions::default()).unwrap()
    }
}

impl Method for Layer {
    fn params(&mut self) -> &mut Params {
        &mut self.params
    }

    fn loss(&self, tape: &Tape, batch: &Batch, _: &Rng) -> Result<Loss> {
        let n = batch.images.shape()[0];
        let weight = self.params.working(tape, self.weight);
        let (y, statistics) = Var::constant(batch.images.reshape(&[n, 12])?).linear(&weight, None)?.batchnorm(1e-5)?;
        let target = Tensor::from_slice(&[1, 5 * n], &Rng::new(2).normal("target", 5 * n))?;
        let total = y.reshape(&[1, 5 * n])?.linear(&Var::constant(target), None)?.reshape(&[])?;
        Ok(Loss { total, parts: Vec::new(), statistics: Some(statistics) })
    }

    fn learn(&mut self, statistics: &Statistics, _: usize) -> Result<()> {
        let mean = statistics.mean.reshape(&[5])?;
        self.params.set_value(self.mean, &mean)
    }

    fn encoder(&self) -> &Vit {
        unreachable!("training does not ask for it")
    }

    fn macs(&self) -> [u64; 2] {
        [0, 0]
    }
}

/// So many threads, each a rank; what each answers.
fn each<T: Send>(world: usize, patience: Duration, act: impl Fn(Ranks) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = Ranks::threads(world, patience).into_iter().map(|ranks| scope.spawn(|| act(ranks))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn values(step: &mut Step, name: &str) -> Vec<f32> {
    let params = step.method().params();
    let id = params.find(name).unwrap();
    params.value(id).data::<f32>().to_vec()
}

#[test]
fn running_statistics_are_those_of_rank_0_and_weights_the_same() {
    let seen = each(3, PATIENCE, |ranks| {
        let mut step = Layer::step(&ranks);
        let images = Rng::new(3).at(ranks.rank() as u64).normal("images", 4 * 12);
        step.add(&Batch::of_images(Tensor::from_slice(&[4, 3, 2, 2], &images).unwrap()), &Rng::new(0)).unwrap();
        let own = values(&mut step, "mean");
        let told = step.finish_telling(0.1, ranks.rank() as f64).unwrap().told;
        (own, values(&mut step, "mean"), values(&mut step, "weight"), told)
    });
    assert!(seen[1].0 != seen[0].0 && seen[2].0 != seen[0].0);
    assert!(seen.iter().all(|(_, mean, weight, told)| *mean == seen[0].0 && *weight == seen[0].2 && *told == [0.0, 1.0, 2.0]));
}

#[test]
fn a_rank_whose_parameters_differ_is_named_by_all() {
    for odd in [0, 2] {
        let ended = each(3, PATIENCE, |ranks| {
            let mut step = Layer::step(&ranks);
            step.check_sync(6).unwrap();
            if ranks.rank() == odd {
                let params = step.method().params();
                let id = params.find("weight").unwrap();
                let mut numbers = params.value(id).data::<f32>().to_vec();
                numbers[59] = f32::from_bits(numbers[59].to_bits() ^ 1);
                params.set_value(id, &Tensor::from_slice(&[5, 12], &numbers).unwrap()).unwrap();
            }
            step.check_sync(7).unwrap_err().chain()
        });
        let wanted = format!("after update 7 the parameters of rank {odd} are not those of the others");
        assert!(ended.iter().all(|said| said.starts_with(&wanted)), "{ended:?}");
    }
}

#[test]
fn ranks_that_do_different_things_both_end_with_the_sentence() {
    let said = each(2, PATIENCE, |ranks| match ranks.rank() {
        0 => ranks.barrier("the end").unwrap_err().chain(),
        _ => ranks.sum("gradients 1 of update 3", &mut [1.0; 4], Wire::F32).unwrap_err().chain(),
    });
    assert_eq!(said[0], said[1]);
    assert!(
        said[0].contains("rank 1 has come to gradients 1 of update 3 (sum, 16 bytes) where rank 0 has come to the end (gather)"),
        "{said:?}"
    );
    // As many bytes are part of what is done.
    let said = each(2, PATIENCE, |ranks| ranks.sum("gradients", &mut vec![1.0; 3 + ranks.rank()], Wire::Bf16).unwrap_err().chain());
    assert!(said[0] == said[1] && said[0].contains("8 bytes") && said[0].contains("6 bytes"), "{said:?}");
}

#[test]
fn a_rank_that_fails_ends_or_hangs_is_named_by_the_others() {
    let said = each(3, PATIENCE, |ranks| match ranks.rank() {
        1 => {
            ranks.fail(&Error::new("the disk is full"));
            String::new()
        }
        _ => ranks.barrier("the end").unwrap_err().chain(),
    });
    assert_eq!([&said[0], &said[2]], ["rank 1 failed: the disk is full"; 2]);
    let said = each(3, PATIENCE, |ranks| if ranks.rank() == 2 { String::new() } else { ranks.barrier("the end").unwrap_err().chain() });
    assert_eq!(said[..2], ["rank 2 has ended"; 2]);
    let said = each(3, Duration::from_millis(1500), |ranks| {
        let started = Instant::now();
        if ranks.rank() == 0 {
            std::thread::sleep(Duration::from_millis(2500));
        }
        let said = ranks.barrier("the end").unwrap_err().chain();
        assert!(started.elapsed() < Duration::from_secs(10));
        said
    });
    assert!(
        said.iter().all(|said| said.starts_with("rank 0 has not come to the end for 2 s; ") && said.contains("--rank-timeout")),
        "{said:?}"
    );
}

#[test]
fn a_rank_that_looks_hears_of_others_over_tcp_without_making_a_call() {
    let join = |rank: usize, port: u16| {
        let launched = Launched {
            rank,
            world: 3,
            local: rank,
            local_world: Some(3),
            address: "127.0.0.1".into(),
            port,
            run: String::new(),
            by: "this test",
        };
        Ranks::join(&launched, PATIENCE).unwrap()
    };
    // Rank 1 says why it ends, or just ends.
    for (fails, wanted) in [(true, "rank 1 failed: its disk is full"), (false, "rank 1 has ended without a word; look at its own output")] {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let ranks: Vec<Ranks> = std::thread::scope(|scope| {
            let joining: Vec<_> = (0..3).map(|rank| scope.spawn(move || join(rank, port))).collect();
            joining.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let mut ranks = ranks.into_iter();
        let [first, second, third] = std::array::from_fn(|_| ranks.next().unwrap());
        for own in [&first, &second, &third] {
            own.look().unwrap();
        }
        if fails {
            second.fail(&Error::new("its disk is full"));
        }
        drop(second);
        let heard = |own: &Ranks| {
            let started = Instant::now();
            loop {
                match own.look() {
                    Err(error) => return error.chain(),
                    Ok(()) => assert!(started.elapsed() < Duration::from_secs(10), "nothing was heard"),
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        };
        // Rank 0 hears of it, and the third rank by rank 0.
        for said in [heard(&first), heard(&third), first.barrier("anything").unwrap_err().chain()] {
            assert!(said.starts_with(wanted), "{said}");
        }
    }
}

#[test]
fn a_rank_that_was_started_otherwise_ends_all_with_its_flag_and_both_values() {
    let base = folder("ranks-refused");
    let command = few("pretrain mae --model glyph_t", 2);
    for (other, parts) in [
        ("--lr 0.5", ["--lr is 0.5 on rank 1", "0.003 on rank 0"]),
        ("--seed 3", ["--seed is 3 on rank 1", "0 on rank 0"]),
        ("--train-images 40", ["--train-images is 40 on rank 1", "48 on rank 0"]),
        ("--clip-grad 1", ["--clip-grad is 1", "not given on rank 0"]),
        ("--shard-optimizer", ["--shard-optimizer is true on rank 1", "false on rank 0"]),
        ("--wire bf16", ["--wire is bf16 on rank 1", "f32 on rank 0"]),
        ("--mask-ratio 0.5", ["--mask-ratio is 0.5 on rank 1", "0.75 on rank 0"]),
        ("--accum-iter 2", ["--accum-iter is 2 on rank 1", "1 on rank 0"]),
    ] {
        let ended = threads(3, |rank| if rank == 1 { format!("{command} {other}") } else { command.clone() }, &base.join("none"));
        for ended in ended {
            let (code, said) = ended.unwrap_err();
            assert!(code == 2 && parts.iter().all(|part| said.contains(part)), "{other}: {code} {said}");
        }
    }
    // What one rank finds to be wrong, the others say with its number.
    let ended =
        threads(2, |rank| if rank == 1 { format!("{command} --data-path /no/such/folder") } else { command.clone() }, &base.join("none"));
    let said: Vec<(u8, String)> = ended.into_iter().map(|ended| ended.unwrap_err()).collect();
    assert!(said[0].0 == 1 && said[0].1 == format!("rank 1 failed: {}", said[1].1) && said[1].1.contains("/no/such/folder"), "{said:?}");
    assert!(checkpoints(&base.join("none")).is_empty());
}
