//! What masking saves: steps of the five systems that look at more or less of each image, beside what arithmetic promises.
//!
//! | module | what it is |
//! |---|---|
//! | [`look`] | a method that looks at another part of each image, and what that multiplies |
//! | [`sweep`] | the points, and their steps in turns |
//! | [`report`] | tables, rows and figures |
//!
//! Efficiency is the measured speed-up over the predicted one: 1 where work that is not done takes no time, less where something does not shrink with it.

pub mod look;
pub mod report;
pub mod sweep;

use super::page::{Page, machine};
use super::subject::{Point, SubjectArgs, System};
use crate::device::Named;
use crate::error::{Context, Error, Result};
use crate::formats;
use crate::methods::dmjd::BaselineName;
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, Command, FromArgMatches, ValueEnum};
use serde_json::{Value, json};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use sweep::{Lists, Rounds, Swept};

/// What is measured and how often.
#[derive(Clone, Debug, Args)]
pub struct MaskingArgs {
    /// Several systems one after the other, separated by commas, or all; what is not typed is small [default: all, unless something is said of what is trained]
    #[arg(long, value_delimiter = ',', conflicts_with = "method", value_name = "NAME,..|all")]
    pub methods: Vec<Which>,
    #[command(flatten)]
    pub subject: Typed<SubjectArgs>,
    #[command(flatten)]
    pub lists: Lists,
    /// Rounds that are measured, each with a step at every point
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,
    /// Rounds before them that are not
    #[arg(long, default_value_t = 1)]
    pub warmup: usize,
    /// Where masking.csv, masking.json and masking.html are written [default: nowhere]
    #[arg(long, value_name = "DIR")]
    pub output_dir: Option<PathBuf>,
    /// One JSON object a line instead of text
    #[arg(long)]
    pub json: bool,
}

/// A system, or all of them.
#[derive(Clone, Debug)]
pub struct Which(Vec<System>);

impl std::str::FromStr for Which {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        if name == "all" {
            return Ok(Self(System::ALL.to_vec()));
        }
        let names = || System::ALL.map(System::name).join(", ");
        let found = System::from_str(name, false)
            .map_err(|_| Error::usage(format!("there is no system {name:?}; there are {} and all", names())))?;
        Ok(Self(vec![found]))
    }
}

/// Arguments, and which of them were typed.
#[derive(Clone, Debug)]
pub struct Typed<A> {
    pub args: A,
    given: Vec<String>,
}

impl<A: Args> Typed<A> {
    fn has(&self, flag: &str) -> bool {
        self.given.iter().any(|given| given == flag)
    }
}

impl<A: Args> FromArgMatches for Typed<A> {
    fn from_arg_matches(matches: &ArgMatches) -> std::result::Result<Self, clap::Error> {
        let own = A::augment_args(Command::new("own"));
        let typed =
            |id: &&str| matches.ids().any(|there| there.as_str() == *id) && matches.value_source(id) == Some(ValueSource::CommandLine);
        let given = own.get_arguments().map(|arg| arg.get_id().as_str()).filter(typed).map(String::from).collect();
        Ok(Self { args: A::from_arg_matches(matches)?, given })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> std::result::Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl<A: Args> Args for Typed<A> {
    fn augment_args(command: Command) -> Command {
        A::augment_args(command)
    }

    fn augment_args_for_update(command: Command) -> Command {
        A::augment_args_for_update(command)
    }
}

/// No point is visited more often than this.
const MOST_ROUNDS: usize = 1_000_000;

/// Flags of what is trained that not all systems read, by their ids, and who reads them.
const READ_BY: [(&str, &[System]); 10] = [
    ("teacher", &[System::Dmae, System::MaskedKd, System::TinyMim]),
    ("decoder_dim", &[System::Mae, System::Dmae, System::Dmjd]),
    ("decoder_depth", &[System::Mae, System::Dmae, System::Dmjd]),
    ("decoder_heads", &[System::Mae, System::Dmae, System::Dmjd]),
    ("norm_pix", &[System::Mae, System::Dmae, System::Dmjd]),
    ("baseline", &[System::Dmjd]),
    ("classes", &[System::MaskedKd]),
    ("views", &[System::Dmjd]),
    ("teacher_blocks", &[System::Dmae, System::TinyMim]),
    ("mask_ratio", &System::ALL),
];

impl MaskingArgs {
    /// The systems, and whether what is not typed is small.
    fn systems(&self) -> (Vec<System>, bool) {
        let mut several: Vec<System> = self.methods.iter().flat_map(|which| which.0.clone()).collect();
        let trained = |flag: &String| !["device", "precision", "seed"].contains(&&flag[..]);
        if several.is_empty() && !self.subject.given.iter().any(trained) && self.lists.is_empty() {
            several = System::ALL.to_vec();
        }
        match several.is_empty() {
            true => (vec![self.subject.args.method], false),
            false => (System::ALL.into_iter().filter(|system| several.contains(system)).collect(), true),
        }
    }

    fn was_typed(&self, flag: &str) -> bool {
        match flag {
            "views" => self.lists.views.is_some(),
            "teacher_blocks" => self.lists.teacher_blocks.is_some(),
            "mask_ratio" => self.lists.mask_ratio.is_some(),
            _ => self.subject.has(flag),
        }
    }

    /// Refuses what cannot be meant of any system.
    fn check(&self, systems: &[System]) -> Result<()> {
        for (flag, value, least) in [("--rounds", self.rounds, 1), ("--warmup", self.warmup, 0), ("--batch", self.subject.args.batch, 1)] {
            if !(least..=MOST_ROUNDS).contains(&value) {
                return Err(Error::usage(format!("{flag} {value} is not from {least} to {MOST_ROUNDS}")));
            }
        }
        let unread = READ_BY.iter().find(|(flag, by)| self.was_typed(flag) && !systems.iter().any(|system| by.contains(system)));
        let names = |systems: &[System]| systems.iter().map(|system| system.name()).collect::<Vec<_>>().join(", ");
        match unread {
            Some((flag, by)) => Err(Error::usage(format!(
                "--{} says something of {}, and {} is measured; leave it out or choose another --method",
                flag.replace('_', "-"),
                names(by),
                names(systems)
            ))),
            None => self.check_decoder(systems),
        }
    }

    /// Refuses sizes of a decoder where no system has one.
    fn check_decoder(&self, systems: &[System]) -> Result<()> {
        let decodes = |&system: &System| SubjectArgs { method: system, ..self.subject.args.clone() }.decodes();
        let typed = ["decoder_dim", "decoder_depth", "decoder_heads"].into_iter().find(|flag| self.was_typed(flag));
        match typed.filter(|_| !systems.iter().any(decodes)) {
            Some(flag) => Err(Error::usage(format!(
                "--{} says something of a decoder, and --baseline maskfeat has none; leave it out",
                flag.replace('_', "-")
            ))),
            None => Ok(()),
        }
    }

    /// One of the systems, of several a small one.
    fn subject(&self, system: System, small: bool) -> SubjectArgs {
        let mut subject = SubjectArgs { method: system, ..self.subject.args.clone() };
        if !small {
            return subject;
        }
        let reads = |flag: &str| READ_BY.iter().all(|(of, by)| *of != flag || by.contains(&system));
        let new = |flag: &str| !self.subject.has(flag);
        if !reads("teacher") {
            subject.teacher = None;
        } else if system == System::TinyMim && new("teacher") {
            subject.teacher = Some("small".to_string());
        }
        subject.norm_pix &= reads("norm_pix");
        if !reads("baseline") {
            subject.baseline = BaselineName::Mae;
        }
        if new("batch") {
            subject.batch = if matches!(subject.device, Named::Gpu(_)) { 64 } else { 4 };
        }
        if system != System::Mae && new("decoder_dim") && new("decoder_depth") && new("decoder_heads") {
            (subject.decoder_dim, subject.decoder_depth, subject.decoder_heads) = (192, 4, 3);
        }
        subject
    }
}

/// Refuses an image of which nothing can be hidden, and what the machine's own memory cannot hold with all but one patch seen; a GPU says so itself.
fn check(subject: &SubjectArgs) -> Result<()> {
    let patches = subject.student()?.patches();
    if patches < 2 {
        return Err(Error::usage(format!("--image-size {}: nothing can be hidden of an image of one patch", subject.image_size)));
    }
    let hiding = (subject.method != System::MaskedKd).then_some(1.0 / patches as f64);
    match subject.device {
        Named::Gpu(_) => Ok(()),
        _ => subject.fits(&Point { mask_ratio: hiding, views: Some(1), ..Point::default() }),
    }
}

/// Measures, prints a table a system, and writes files where that was asked for. A system that cannot be measured is said and the others are not kept from it.
pub fn run(args: &MaskingArgs, print: &mut dyn FnMut(&str)) -> Result<()> {
    let (systems, small) = args.systems();
    args.check(&systems)?;
    let subject = &args.subject.args;
    subject.device.open()?.compute_in(subject.precision)?;
    if let Some(folder) = &args.output_dir {
        super::page::try_folder(folder)?;
    }
    let (mut all, mut failed) = (Vec::new(), Vec::new());
    for &system in &systems {
        let subject = args.subject(system, small);
        let rounds = Rounds { counted: args.rounds, before: args.warmup };
        match check(&subject).and_then(|()| sweep::sweep(&subject, &args.lists, rounds)) {
            Ok(swept) => {
                print(&if args.json { swept.json().to_string() } else { swept.text() });
                all.push(swept);
            }
            Err(error) if systems.len() == 1 => return Err(error),
            Err(error) => {
                print(&match args.json {
                    true => json!({ "what": "masking", "method": system.name(), "error": error.chain() }).to_string(),
                    false => format!("{}: not measured: {}\n", system.name(), error.chain()),
                });
                failed.push((system.name(), error));
            }
        }
    }
    if let (Some(folder), false) = (&args.output_dir, all.is_empty()) {
        write(folder, args, &all, &failed)?;
        if !args.json {
            print(&format!(
                "written: {}",
                ["csv", "json", "html"].map(|kind| folder.join(format!("masking.{kind}")).display().to_string()).join(", ")
            ));
        }
    }
    match failed.len() {
        0 => Ok(()),
        // The same was wrong with all of them.
        count if count == systems.len() => Err(failed.remove(0).1),
        count => Err(Error::new(format!(
            "{count} of {} systems could not be measured: {}",
            systems.len(),
            failed.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
        ))),
    }
}

fn write(folder: &Path, args: &MaskingArgs, all: &[Swept], failed: &[(&str, Error)]) -> Result<()> {
    let subject = &args.subject.args;
    let facts = machine(subject.device, &all[0].device, subject.precision);
    let failures: Vec<String> = failed.iter().map(|(name, error)| format!("{name}: not measured: {}", error.chain())).collect();
    let text = |name: &str, text: String| {
        formats::write_atomically(&folder.join(name), |out| out.write_all(text.as_bytes()).context("writing its text"))
    };
    text("masking.csv", report::csv(all))?;
    let facts_of = |(name, value): &(&str, String)| (name.to_lowercase().replace(' ', "_"), json!(value));
    let mut whole: serde_json::Map<String, Value> = facts.iter().map(facts_of).collect();
    whole.insert("systems".into(), all.iter().map(Swept::json).collect());
    whole.insert("failed".into(), json!(failures));
    text("masking.json", format!("{:#}\n", Value::Object(whole)))?;

    let lead = "Steps of pre-training and distillation that look at more or less of each image: where their time goes, how much faster they are than with \
                nothing hidden, and how much of what arithmetic promises that is.";
    let mut page = Page::new("What masking saves", lead);
    for (name, value) in facts {
        page.fact(name, value);
    }
    page.fact(
        "Rounds",
        format!("{} after {} that do not count; every point once a round, in reverse order every other round", args.rounds, args.warmup),
    );
    all.iter().for_each(|swept| swept.page(&mut page));
    failures.iter().for_each(|failure| page.text(failure));
    page.write(&folder.join("masking.html"))
}
