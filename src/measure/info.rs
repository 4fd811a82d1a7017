//! What this program and this machine offer: processor, devices or the reason why there is none, libraries, kernels.

use crate::device::gpu::Gpu;
use crate::device::launch::{FILES, KERNELS};
use crate::device::libs::{self, Library};
use crate::device::real::{Facts, KernelFacts};
use crate::device::{gemm, parallel, simd};
use crate::error::Result;
use crate::nn::{convit, presets};

/// Prints everything; with `kernels` also each kernel, and where there is a GPU what its compiler made of it.
pub fn run(kernels: bool, print: &mut dyn FnMut(&str)) -> Result<()> {
    print(&format!("masque {}\n", env!("CARGO_PKG_VERSION")));
    print(
        &(format!("cpu        {} threads, {}", parallel::threads(), simd::level().name())
            + if gemm::has_bf16() { ", products of bf16" } else { "" }),
    );
    let emulated = KERNELS.iter().filter(|kernel| kernel.entry.is_some()).count();
    print(&match emulated {
        0 => "emulated   not in this binary; build with the feature \"emulated\"".to_string(),
        count => format!("emulated   {count} kernels by the C++ compiler"),
    });
    match Facts::all() {
        Ok(all) => all.iter().enumerate().for_each(|(at, facts)| print(&device(at, facts))),
        Err(reason) => print(&format!("gpu        none: {}", reason.chain())),
    }
    print("");
    for library in Library::ALL {
        let name = library.name();
        print(&match libs::find(library) {
            None => match libs::unbound(library) {
                None => format!("{name:<17}  not found"),
                Some((path, reason)) => format!("{name:<17}  {} not used: {reason}", path.display()),
            },
            Some(path) => format!("{name:<17}  {} {}", path.display(), libs::version(library).unwrap_or_default()).trim_end().to_string(),
        });
    }
    print("\nfile            kernels  device code  for");
    for (at, file) in FILES.iter().enumerate() {
        let count = KERNELS.iter().filter(|kernel| kernel.file == at).count();
        let code = if file.fatbin.is_empty() { "none".to_string() } else { format!("{:.1} KB", file.fatbin.len() as f64 / 1e3) };
        let archs = if file.archs.is_empty() { "no nvcc when this was built; needs NVRTC".to_string() } else { file.archs.join(", ") };
        print(&format!("{:<15} {count:>7} {code:>12}  {archs}", file.name));
    }
    let bytes = FILES.iter().map(|file| file.fatbin.len()).sum::<usize>();
    print(&format!("{:<15} {:>7} {:>9.1} KB", "all", KERNELS.len(), bytes as f64 / 1e3));
    if kernels {
        list(print)?;
    }
    print("\nmodel     width  blocks  heads  patch");
    for size in presets::NAMES {
        let config = presets::mae(size, 224)?;
        print(&format!("{size:<8} {:>6} {:>7} {:>6} {:>6}", config.width, config.depth, config.heads, config.patch));
    }
    print("\nConViT        stages     blocks    MLP ratios  width  blocks  heads  patch");
    for size in convit::NAMES {
        let config = convit::encoder(size, 224)?;
        let Some(stages) = &config.stages else { continue };
        let pair = |[a, b]: [String; 2]| format!("{a}, {b}");
        let (widths, depths, ratios) = (stages.widths, stages.depths, stages.mlp_ratios);
        let [widths, depths, ratios] =
            [widths.map(|n| n.to_string()), depths.map(|n| n.to_string()), ratios.map(|r| r.to_string())].map(pair);
        print(&format!(
            "{size:<12}  {widths:<9}  {depths:<8}  {ratios:<10}  {:>5} {:>7} {:>6} {:>6}",
            config.width, config.depth, config.heads, config.patch
        ));
    }
    Ok(())
}

/// The processor by its maker's name, with the vector instructions that are used.
pub fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':').map(|(_, name)| name.trim().to_string()));
    format!("{} ({})", name.unwrap_or_else(|| std::env::consts::ARCH.to_string()), simd::level().name())
}

/// Day and time now: 2026-02-28 09:05 UTC.
pub fn utc() -> String {
    let seconds = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    utc_of(seconds)
}

/// Of seconds since 1970.
fn utc_of(seconds: u64) -> String {
    // Years begin in March here, so that a leap day is the last of its year; 146097 days are 400 years.
    let days = seconds / 86400 + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (day, month) = (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let year = 400 * era + year + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02} UTC", seconds / 3600 % 24, seconds / 60 % 60)
}

fn device(ordinal: usize, facts: &Facts) -> String {
    let Facts { name, capability: (major, minor), memory, multiprocessors, cache, most_shared } = facts;
    format!(
        "gpu:{ordinal:<6} {name}, compute capability {major}.{minor}, {} MB, {multiprocessors} multiprocessors, {} MB of cache, blocks of up to {} KB of \
         shared memory",
        memory >> 20,
        cache >> 20,
        most_shared >> 10
    )
}

/// Every kernel; on a device that does not open only their names.
fn list(print: &mut dyn FnMut(&str)) -> Result<()> {
    let gpu = Gpu::cuda(0).ok();
    print(match gpu {
        Some(_) => {
            "\nkernel                                             file            registers  shared  local  threads  blocks/SM  code"
        }
        None => "\nkernel                                             file            (registers and the like need a GPU)",
    });
    for (at, kernel) in KERNELS.iter().enumerate() {
        let line = format!("{:<50} {:<15}", kernel.name, FILES[kernel.file].name);
        let facts = gpu.as_ref().and_then(Gpu::as_real).map(|real| real.kernel_facts(at)).transpose()?;
        print(&match facts {
            None => line.trim_end().to_string(),
            Some(KernelFacts { registers, shared, local, threads, blocks, arch }) => {
                format!("{line} {registers:>9} {shared:>7} {local:>6} {threads:>8} {blocks:>10}  sm_{arch}")
            }
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_those_of_the_calendar() {
        for (seconds, said) in [
            (0, "1970-01-01 00:00 UTC"),
            (951_782_399, "2000-02-28 23:59 UTC"),
            (951_782_400, "2000-02-29 00:00 UTC"),
            (1_709_251_200, "2024-03-01 00:00 UTC"),
            (4_107_542_400, "2100-03-01 00:00 UTC"),
        ] {
            assert_eq!(utc_of(seconds), said);
        }
    }
}
