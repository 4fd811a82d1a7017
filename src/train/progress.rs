//! How far a run is: one line that is redrawn on a terminal, a plain line now and then elsewhere.
//!
//! The loss is shown as "median of the last 20 (mean of all)". Images/s and FLOP/s are those of the last half a minute of training; what was spent on
//! evaluation and checkpoints between [`Progress::pause`] and [`Progress::go_on`] does not count.

use std::collections::VecDeque;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Losses in the median.
const WINDOW: usize = 20;
/// Between two drawings on a terminal.
const REDRAW: Duration = Duration::from_millis(100);
/// Before the first plain line, and between two of them.
const FIRST: Duration = Duration::from_secs(2);
const BETWEEN: Duration = Duration::from_secs(10);
/// How much of the past tells the speed, and how finely it is kept.
const PAST: Duration = Duration::from_secs(30);
const GRAIN: Duration = Duration::from_millis(250);

/// What a run is made of.
#[derive(Clone, Copy, Debug, Default)]
pub struct Plan {
    /// Updates in all, and those taken before this run began (it goes on from a checkpoint).
    pub updates: u64,
    pub before: u64,
    pub epochs: f64,
    pub images_per_update: usize,
    /// Of a training step, forward and backward; 0 if unknown.
    pub flops_per_image: f64,
}

/// What is known after an update.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    pub update: u64,
    /// Epochs so far, with the fraction.
    pub epoch: f64,
    /// None where the loss was not asked for.
    pub loss: Option<f64>,
    pub lr: f64,
    /// Steps skipped so far.
    pub skipped: u64,
}

pub struct Progress {
    plan: Plan,
    seen: Seen,
    losses: VecDeque<f64>,
    sum: f64,
    count: u64,
    /// Time spent training: up to `since`, while the clock stands still if that is None.
    busy: Duration,
    since: Option<Instant>,
    past: VecDeque<(Duration, u64)>,
    terminal: bool,
    blocks: bool,
    drawn: bool,
    shown: Option<Instant>,
    started: Instant,
    closed: bool,
}

impl Progress {
    pub fn new(plan: Plan) -> Self {
        let terminal = std::io::stdout().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().filter_map(|name| std::env::var(name).ok()).find(|value| !value.is_empty());
        let blocks = locale.is_some_and(|locale| locale.to_ascii_lowercase().replace('-', "").contains("utf8"));
        let now = Instant::now();
        Self {
            plan,
            seen: Seen { update: plan.before, ..Seen::default() },
            losses: VecDeque::new(),
            sum: 0.0,
            count: 0,
            busy: Duration::ZERO,
            since: Some(now),
            past: VecDeque::from([(Duration::ZERO, plan.before)]),
            terminal,
            blocks,
            drawn: false,
            shown: None,
            started: now,
            closed: false,
        }
    }

    /// The same of a rank that does not print.
    pub fn silent(plan: Plan) -> Self {
        let mut silent = Self::new(plan);
        (silent.terminal, silent.closed) = (false, true);
        silent
    }

    /// After an update.
    pub fn step(&mut self, seen: Seen) {
        let now = Instant::now();
        self.seen = seen;
        if let Some(loss) = seen.loss {
            if self.losses.len() == WINDOW {
                self.losses.pop_front();
            }
            self.losses.push_back(loss);
            if loss.is_finite() {
                (self.sum, self.count) = (self.sum + loss, self.count + 1);
            }
        }
        self.keep_time(now);
        let since = now - self.shown.unwrap_or(self.started);
        if self.terminal {
            if self.shown.is_none() || since >= REDRAW || seen.update >= self.plan.updates {
                self.draw(now);
            }
        } else if since >= BETWEEN || (self.shown.is_none() && since >= FIRST) {
            let line = self.fields(now).join("  ");
            self.print(&format!("{line}\n"));
            self.shown = Some(now);
        }
    }

    /// The clock of the speed stands still until [`Progress::go_on`].
    pub fn pause(&mut self) {
        if let Some(since) = self.since.take() {
            self.busy += since.elapsed();
        }
    }

    pub fn go_on(&mut self) {
        self.since.get_or_insert_with(Instant::now);
    }

    /// Prints a message; on a terminal it stands above the bar.
    pub fn line(&mut self, text: &str) {
        if self.drawn {
            self.print(&format!("\r\x1b[K{text}\n"));
            self.drawn = false;
            self.draw(Instant::now());
        } else {
            self.print(&format!("{text}\n"));
        }
    }

    /// Leaves the last state standing, and the cursor on a line of its own.
    pub fn finish(&mut self) {
        let now = Instant::now();
        if self.terminal {
            self.draw(now);
            self.print("\n");
            self.drawn = false;
        } else if self.seen.update > self.plan.before {
            let line = self.fields(now).join("  ");
            self.print(&format!("{line}\n"));
        }
    }

    /// Whether whoever read the output has gone away; nothing is printed any more.
    pub fn closed(&self) -> bool {
        self.closed
    }

    /// Over the last half minute of training.
    pub fn images_per_s(&self) -> Option<f64> {
        let (&(from, first), busy) = (self.past.front()?, self.busy_at(Instant::now()));
        let seconds = (busy.saturating_sub(from)).as_secs_f64();
        (seconds > 0.0 && self.seen.update > first)
            .then(|| (self.seen.update - first) as f64 * self.plan.images_per_update as f64 / seconds)
    }

    fn busy_at(&self, now: Instant) -> Duration {
        self.busy + self.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }

    fn keep_time(&mut self, now: Instant) {
        let busy = self.busy_at(now);
        if self.past.back().is_none_or(|&(last, _)| busy - last >= GRAIN) {
            self.past.push_back((busy, self.seen.update));
        }
        while self.past.len() > 2 && busy - self.past[1].0 >= PAST {
            self.past.pop_front();
        }
    }

    /// What is known, the most wanted first.
    fn fields(&self, now: Instant) -> Vec<String> {
        let (plan, seen) = (&self.plan, &self.seen);
        let mut fields =
            vec![format!("{:3.0} %", 100.0 * self.fraction()), format!("epoch {}/{}", decimals(seen.epoch, 2), trimmed(plan.epochs))];
        if let Some(loss) = median(self.losses.iter().copied().collect()) {
            let mean = if self.count > 0 { format!(" ({})", loss_text(self.sum / self.count as f64)) } else { String::new() };
            fields.push(format!("loss {}{mean}", loss_text(loss)));
        }
        let rate = self.images_per_s();
        if seen.update >= plan.updates {
            fields.push(format!("{} in all", clock((now - self.started).as_secs_f64())));
        } else if let Some(left) = self.time_left(rate, now) {
            fields.push(format!("{} left", clock(left)));
        }
        if let Some(rate) = rate {
            fields.push(format!("{} images/s", three_digits(rate)));
            if plan.flops_per_image > 0.0 {
                fields.push(flops_text(rate * plan.flops_per_image));
            }
        }
        if seen.skipped > 0 {
            fields.push(format!("{} skipped", seen.skipped));
        }
        fields.push(format!("lr {}", if seen.lr == 0.0 { "0".to_string() } else { format!("{:.2e}", seen.lr) }));
        fields.push(format!("update {}/{}", seen.update, plan.updates));
        fields
    }

    fn fraction(&self) -> f64 {
        if self.plan.updates == 0 { 1.0 } else { (self.seen.update as f64 / self.plan.updates as f64).min(1.0) }
    }

    /// Seconds at the present speed, with the share that was spent on evaluation so far.
    fn time_left(&self, rate: Option<f64>, now: Instant) -> Option<f64> {
        let images = self.plan.updates.saturating_sub(self.seen.update) as f64 * self.plan.images_per_update as f64;
        let (busy, all) = (self.busy_at(now).as_secs_f64(), (now - self.started).as_secs_f64());
        Some(images / rate? * if busy > 1.0 { all / busy } else { 1.0 })
    }

    fn draw(&mut self, now: Instant) {
        let width = terminal_size::terminal_size().map_or(80, |(width, _)| width.0 as usize);
        let line = fitted(&self.fields(now), self.fraction(), width.saturating_sub(1), self.blocks);
        self.print(&format!("\r{line}\x1b[K"));
        (self.drawn, self.shown) = (true, Some(now));
    }

    fn print(&mut self, text: &str) {
        if !self.closed {
            let mut out = std::io::stdout();
            self.closed = out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err();
        }
    }
}

impl Drop for Progress {
    /// A run that ends early leaves its bar on a line of its own.
    fn drop(&mut self) {
        if self.drawn {
            self.print("\n");
        }
    }
}

/// The bar and as many fields as fit, at most `width` columns; the bar takes what the fields leave, from 10 to 40 columns.
fn fitted(fields: &[String], fraction: f64, width: usize, blocks: bool) -> String {
    const LEAST: usize = 10;
    let for_text = if width >= 48 { width - LEAST - 1 } else { width };
    let mut text = String::new();
    for field in fields {
        let longer = text.chars().count() + field.chars().count() + 2 * usize::from(!text.is_empty());
        if longer > for_text {
            break;
        }
        if !text.is_empty() {
            text.push_str("  ");
        }
        text.push_str(field);
    }
    let room = width.saturating_sub(text.chars().count() + 1);
    if room < LEAST || text.is_empty() { text } else { format!("{} {text}", bar(fraction, room.min(40), blocks)) }
}

fn bar(fraction: f64, width: usize, blocks: bool) -> String {
    let eighths = (fraction.clamp(0.0, 1.0) * 8.0 * width as f64).round() as usize;
    let (full, rest) = (eighths / 8, eighths % 8);
    if !blocks {
        return format!("{}{}", "#".repeat(full), ".".repeat(width - full));
    }
    let part = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"][rest];
    format!("{}{part}{}", "█".repeat(full), "░".repeat(width - full - usize::from(rest > 0)))
}

/// The middle one, the lower of two (as PyTorch's median is).
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    (!values.is_empty()).then(|| values[(values.len() - 1) / 2])
}

fn loss_text(loss: f64) -> String {
    if loss == 0.0 || (1e-3..1e4).contains(&loss.abs()) || !loss.is_finite() { format!("{loss:.4}") } else { format!("{loss:.2e}") }
}

fn decimals(value: f64, places: usize) -> String {
    format!("{value:.places$}")
}

/// Without zeros behind the point.
fn trimmed(value: f64) -> String {
    let text = decimals(value, 2);
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

/// About three digits, and no exponent.
pub(super) fn three_digits(value: f64) -> String {
    let places = match value.abs() {
        size if size < 9.995 => 2,
        size if size < 99.95 => 1,
        _ => 0,
    };
    decimals(value, places)
}

pub(super) fn flops_text(per_second: f64) -> String {
    let (unit, scale) =
        [("PFLOP/s", 1e15), ("TFLOP/s", 1e12)].into_iter().find(|&(_, scale)| per_second >= scale).unwrap_or(("GFLOP/s", 1e9));
    format!("{} {unit}", three_digits(per_second / scale))
}

/// 0:07, 12:34, 1:02:03, 2 d 03:04.
pub(super) fn clock(seconds: f64) -> String {
    let s = seconds.max(0.0).round().min(1e15) as u64;
    let (days, hours, minutes, seconds) = (s / 86400, s / 3600 % 24, s / 60 % 60, s % 60);
    match (days, hours) {
        (0, 0) => format!("{minutes}:{seconds:02}"),
        (0, _) => format!("{hours}:{minutes:02}:{seconds:02}"),
        _ => format!("{days} d {hours:02}:{minutes:02}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress() -> Progress {
        let plan = Plan { updates: 200, before: 0, epochs: 40.0, images_per_update: 64, flops_per_image: 5e8 };
        let mut progress = Progress::new(plan);
        (progress.terminal, progress.blocks) = (false, true);
        progress
    }

    #[test]
    fn a_line_never_exceeds_its_width() {
        let fields =
            ["  7 %", "epoch 3.25/40", "loss 0.4321 (0.5123)", "1:20 left", "912 images/s", "45.1 GFLOP/s", "lr 1.20e-4"].map(String::from);
        for width in 0..200 {
            for blocks in [true, false] {
                let line = fitted(&fields, 0.07, width, blocks);
                assert!(line.chars().count() <= width, "{width}: {line:?}");
                assert!(
                    width < 60 || (line.contains("loss 0.4321 (0.5123)") && line.contains(if blocks { '░' } else { '.' })),
                    "{width}: {line:?}"
                );
                assert!(!line.contains('\n'));
            }
        }
        let wide = fitted(&fields, 0.07, 200, true);
        assert!(wide.ends_with("lr 1.20e-4") && wide.starts_with("██"), "{wide}");
    }

    #[test]
    fn a_bar_has_its_width_and_grows_by_eighths() {
        let bars: Vec<String> = [0.0, 0.0125, 0.5, 0.9999, 1.0, 7.0].iter().map(|&fraction| bar(fraction, 10, true)).collect();
        assert_eq!(bars, ["░░░░░░░░░░", "▏░░░░░░░░░", "█████░░░░░", "██████████", "██████████", "██████████"]);
        assert_eq!(bar(0.25, 8, false), "##......");
    }

    #[test]
    fn numbers_read_as_a_person_writes_them() {
        assert_eq!([0.4, 59.6, 3723.0, 183_840.0].map(clock), ["0:00", "1:00", "1:02:03", "2 d 03:04"]);
        assert_eq!([4.5e9, 1.234e12, 9.87e14, 3.1e15].map(flops_text), ["4.50 GFLOP/s", "1.23 TFLOP/s", "987 TFLOP/s", "3.10 PFLOP/s"]);
        assert_eq!([0.123, 12.34, 912.4, 12_345.0].map(three_digits), ["0.12", "12.3", "912", "12345"]);
        assert_eq!([0.43214, 1e-7, 123_456.0, f64::NAN].map(loss_text), ["0.4321", "1.00e-7", "1.23e5", "NaN"]);
        assert_eq!([40.0, 2.5, 0.25].map(trimmed), ["40", "2.5", "0.25"]);
    }

    #[test]
    fn the_loss_is_the_median_of_the_last_twenty_and_the_mean_of_all() {
        let mut progress = progress();
        for update in 1..=30u64 {
            let loss = Some(if update == 25 { f64::NAN } else { update as f64 });
            progress.step(Seen { update, epoch: update as f64 / 5.0, loss, lr: 1e-3, skipped: 1 });
        }
        let fields = progress.fields(Instant::now());
        let mean = ((1..=30).sum::<u64>() - 25) as f64 / 29.0;
        assert!(fields.contains(&format!("loss 20.0000 ({mean:.4})")), "{fields:?}");
        assert!(fields.contains(&"1 skipped".to_string()) && fields.contains(&"epoch 6.00/40".to_string()), "{fields:?}");
        assert_eq!(fields.first().unwrap(), " 15 %");
        assert_eq!(fields.last().unwrap(), "update 30/200");
    }

    #[test]
    fn the_speed_leaves_pauses_out_and_starts_at_the_checkpoint() {
        let mut progress = progress();
        progress.plan.before = 100;
        progress.past = VecDeque::from([(Duration::ZERO, 100)]);
        progress.pause();
        progress.busy = Duration::from_secs(2);
        progress.step(Seen { update: 110, epoch: 22.0, loss: None, lr: 1e-3, skipped: 0 });
        assert_eq!(progress.images_per_s(), Some(10.0 * 64.0 / 2.0));
        progress.started = Instant::now();
        let fields = progress.fields(progress.started + Duration::from_secs(2));
        assert!(fields.contains(&"0:18 left".to_string()) && fields.contains(&"160 GFLOP/s".to_string()), "{fields:?}");
        assert!(!fields.iter().any(|field| field.starts_with("loss")), "{fields:?}");
    }

    #[test]
    fn the_past_that_tells_the_speed_is_half_a_minute() {
        let mut progress = progress();
        progress.pause();
        for second in 1..=100u64 {
            progress.busy = Duration::from_secs(second);
            progress.seen.update = if second <= 50 { second } else { 50 + 3 * (second - 50) };
            progress.keep_time(Instant::now());
        }
        assert_eq!(progress.images_per_s(), Some(3.0 * 64.0));
        assert!(progress.past.len() <= 33, "{}", progress.past.len());
    }
}
