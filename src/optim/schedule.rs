//! Learning rates as functions of time, all in f64.
//!
//! Both schedules warm up linearly and fall along half a cosine; they differ in almost everything else.
//!
//!   MAE, at the fractional epoch e of every update, warm-up w, length T:
//!     e < w:   peak * e / w                                       starts at exactly 0, not at min
//!     e >= w:  min + (peak - min) * (1 + cos(pi (e - w) / (T - w))) / 2
//!
//!   timm (DeiT, MaskedKD), at whole epochs t, warm-up W from w0, cycle length T:
//!     t < W:   w0 + t (base - w0) / W
//!     t >= W:  min*g + (base*g - min*g) * (1 + cos(pi (t - T i) / T)) / 2,   i = t / T rounded down, g = decay_rate^i
//!     and min once the cycles are used up.  The cosine runs on t, not on t - W, so the rate jumps at t = W.
//!
//! A group with its own scale multiplies the whole value, the floor included.

use std::f64::consts::PI;

/// MAE: the base rate is per 256 images; `effective_batch` counts accumulation steps and devices.
pub fn peak_per_256(base_lr: f64, effective_batch: usize) -> f64 {
    base_lr * effective_batch as f64 / 256.0
}

/// DMJD: the batch counts by how much more of an image a step predicts than a view hides.
pub fn peak_predicted(base_lr: f64, effective_batch: usize, [predicted, hidden]: [f64; 2]) -> f64 {
    base_lr * (effective_batch as f64 * (predicted / hidden)) / 256.0
}

/// DeiT: the given rate is per 512 images. The floor and the warm-up start are not scaled.
pub fn peak_per_512(lr: f64, global_batch: usize) -> f64 {
    lr * global_batch as f64 / 512.0
}

/// The MAE schedule at a fractional epoch; `warmup` and `total` in epochs. From `total` on it stays at `min_lr`.
pub fn mae_cosine(epoch_fraction: f64, peak: f64, min_lr: f64, warmup: f64, total: f64) -> f64 {
    if epoch_fraction < warmup {
        peak * epoch_fraction / warmup
    } else if epoch_fraction < total {
        min_lr + (peak - min_lr) * 0.5 * (1.0 + (PI * (epoch_fraction - warmup) / (total - warmup)).cos())
    } else {
        min_lr
    }
}

/// timm's cosine schedule, stepped once an epoch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TimmCosine {
    pub base: f64,
    /// Length of a cycle in epochs.
    pub t_initial: usize,
    pub lr_min: f64,
    pub warmup_t: usize,
    pub warmup_lr_init: f64,
    /// Number of cycles; 0 for no limit.
    pub cycle_limit: usize,
    /// Factor on `base` and `lr_min` from one cycle to the next.
    pub decay_rate: f64,
}

impl TimmCosine {
    /// One cycle, as every DeiT recipe has it.
    pub fn new(base: f64, epochs: usize, lr_min: f64, warmup_t: usize, warmup_lr_init: f64) -> Self {
        Self { base, t_initial: epochs, lr_min, warmup_t, warmup_lr_init, cycle_limit: 1, decay_rate: 1.0 }
    }

    /// The rate between construction and the first step.
    pub fn at_construction(&self) -> f64 {
        if self.warmup_t > 0 { self.warmup_lr_init } else { self.base }
    }

    /// The rate after `step(t)`.
    pub fn at(&self, t: usize) -> f64 {
        if t < self.warmup_t {
            return self.warmup_lr_init + t as f64 * (self.base - self.warmup_lr_init) / self.warmup_t as f64;
        }
        let Some(cycle) = t.checked_div(self.t_initial) else { return self.lr_min };
        if self.cycle_limit > 0 && cycle >= self.cycle_limit {
            return self.lr_min;
        }
        let decay = self.decay_rate.powf(cycle as f64);
        let (low, high) = (self.lr_min * decay, self.base * decay);
        let within = (t % self.t_initial) as f64 / self.t_initial as f64;
        low + 0.5 * (high - low) * (1.0 + (PI * within).cos())
    }

    /// The rate at which epoch `epoch` trains. The trainers step with the number of the epoch just finished, so every epoch runs on the
    /// value of the one before it and the first two share theirs.
    pub fn during_epoch(&self, epoch: usize) -> f64 {
        self.at(epoch.saturating_sub(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn close(found: f64, expected: f64, relative: f64) {
        assert!((found - expected).abs() <= relative * expected.abs(), "{found:e} is not {expected:e}");
    }

    #[test]
    fn dmjd_scales_the_rate_by_what_is_predicted_and_warms_up_as_mae_does() {
        let peak = peak_predicted(6e-4, 512, [1.0, 0.6]);
        assert_eq!(peak, 6e-4 * (512.0 * (1.0 / 0.6)) / 256.0);
        assert!((peak - 2.0e-3).abs() < 1e-12, "{peak}");
        assert_eq!(peak_predicted(1e-3, 64, [0.75, 0.75]), peak_per_256(1e-3, 64));
        for (epoch, rate) in
            [(0.0, 0.0), (0.5, 5e-5), (10.0, 1e-3), (20.0, 2e-3), (100.0, 1.78914051e-3), (210.0, 1e-3), (399.0, 3.4174e-8)]
        {
            let found = mae_cosine(epoch, peak, 0.0, 20.0, 400.0);
            assert!((found - rate).abs() <= 2e-5 * rate + 1e-12, "epoch {epoch}: {found} is not {rate}");
        }
    }

    #[test]
    fn mae_schedule_has_the_published_pretraining_values() {
        let lr = |e| mae_cosine(e, 2.4e-3, 0.0, 40.0, 800.0);
        assert_eq!(lr(0.0), 0.0);
        close(lr(0.5), 3e-5, 1e-14);
        close(lr(39.999), 2.39994e-3, 1e-14);
        close(lr(100.0), 2.363280319127196e-3, 1e-14);
        close(lr(420.0), 1.2e-3, 1e-14);
        assert_eq!(peak_per_256(1.5e-4, 4096), 2.4e-3);
    }

    #[test]
    fn mae_schedule_has_the_published_finetuning_values() {
        let lr = |e| mae_cosine(e, 2e-3, 1e-6, 5.0, 100.0);
        close(lr(2.5), 1e-3, 1e-14);
        close(lr(5.0), 2e-3, 1e-14);
        close(lr(50.0), 1.0830380557995962e-3, 1e-14);
        close(lr(99.9), 1.0054651859e-6, 1e-10);
        assert_eq!(lr(100.0), 1e-6);
        assert_eq!(peak_per_256(5e-4, 1024), 2e-3);
    }

    #[test]
    fn mae_warmup_starts_at_zero_whatever_the_floor() {
        assert_eq!(mae_cosine(0.0, 2e-3, 1e-6, 5.0, 100.0), 0.0);
        assert_eq!(mae_cosine(0.0, 2e-3, 1e-6, 0.0, 100.0), 2e-3);
    }

    #[test]
    fn schedules_stay_finite_when_nothing_follows_the_warmup() {
        assert_eq!(mae_cosine(5.0, 2e-3, 1e-6, 5.0, 5.0), 1e-6);
        assert_eq!(mae_cosine(3.0, 2e-3, 1e-6, 4.0, 2.0), 1.5e-3);
        assert_eq!(TimmCosine::new(1e-3, 0, 1e-5, 0, 1e-6).at(0), 1e-5);
    }

    #[test]
    fn timm_schedule_has_the_rates_of_the_maskedkd_logs() {
        let lr = TimmCosine::new(peak_per_512(5e-4, 1024), 300, 1e-5, 5, 1e-6);
        let expected = [1e-6, 1e-6, 2.008e-4, 4.006e-4, 6.004e-4, 8.002e-4];
        for (epoch, expected) in expected.into_iter().enumerate() {
            close(lr.during_epoch(epoch), expected, 1e-13);
        }
        close(lr.during_epoch(6), 9.993216e-4, 1e-7);
        close(lr.during_epoch(7), 9.990232e-4, 1e-7);
        close(lr.during_epoch(299), 1.0108562e-5, 1e-7);
        assert_eq!(lr.at_construction(), 1e-6);
    }

    #[test]
    fn timm_schedule_without_warmup_starts_at_the_base_rate() {
        let lr = TimmCosine::new(1e-3, 10, 1e-5, 0, 1e-6);
        assert_eq!(lr.at_construction(), 1e-3);
        assert_eq!(lr.at(0), 1e-3);
    }

    #[test]
    fn timm_cycles_repeat_decayed_until_the_limit() {
        let lr = TimmCosine { cycle_limit: 2, decay_rate: 0.5, ..TimmCosine::new(1e-3, 10, 1e-5, 0, 1e-6) };
        for t in 0..10 {
            close(lr.at(10 + t), 0.5 * lr.at(t), 1e-14);
        }
        assert_eq!(lr.at(20), 1e-5);
        assert!(TimmCosine { cycle_limit: 0, ..lr }.at(20) > 1e-4);
    }
}
