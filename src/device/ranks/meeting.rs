//! What all ranks do together, and what comes of it.
//!
//!   gather      everybody gets what each rank gives, in the order of the ranks
//!   collect     rank 0 gets it
//!   broadcast   everybody gets what rank 0 gives
//!   sum         everybody gets ((x_0 + x_1) + x_2) + .., number by number, in f32
//!   sum parts   rank r gets part r of that
//!   share       everybody gets the ranks' parts one behind the other
//!
//! In bf16 numbers are rounded before they are sent, the sum is taken in f32, and rounded once more to be sent back: everybody gets the same bits.

use crate::error::{Error, Result};
use crate::{bail, ensure};
use half::bf16;
use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::time::Duration;

/// Something that all ranks do together.
pub struct Call<'a> {
    /// What it is about: "the gradients of update 12".
    pub what: &'a str,
    pub kind: Kind<'a>,
}

#[derive(Clone, Copy)]
pub enum Kind<'a> {
    Gather,
    Collect,
    Broadcast,
    Sum(Wire),
    SumParts(Wire, &'a [Range<usize>]),
    Share,
}

impl Kind<'_> {
    fn name(self) -> &'static str {
        match self {
            Kind::Gather => "gather",
            Kind::Collect => "collect",
            Kind::Broadcast => "broadcast",
            Kind::Sum(_) => "sum",
            Kind::SumParts(..) => "sum of parts",
            Kind::Share => "share",
        }
    }

    /// Whether every rank has to give as many bytes.
    fn is_even(self) -> bool {
        matches!(self, Kind::Sum(_) | Kind::SumParts(..))
    }
}

/// How numbers are sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Wire {
    #[default]
    F32,
    /// Half as many bytes, and 8 significant bits.
    Bf16,
}

impl Wire {
    pub fn bytes(self) -> usize {
        match self {
            Wire::F32 => 4,
            Wire::Bf16 => 2,
        }
    }

    /// Numbers as they are sent.
    pub fn packed(self, numbers: &[f32]) -> Cow<'_, [u8]> {
        match self {
            Wire::F32 => Cow::Borrowed(bytemuck::cast_slice(numbers)),
            Wire::Bf16 => Cow::Owned(numbers.iter().flat_map(|&x| bf16::from_f32(x).to_bits().to_ne_bytes()).collect()),
        }
    }

    pub fn unpack(self, bytes: &[u8], numbers: &mut [f32]) -> Result<()> {
        ensure!(bytes.len() == numbers.len() * self.bytes(), "{} bytes came for {} numbers in {self}", bytes.len(), numbers.len());
        match self {
            Wire::F32 => bytemuck::cast_slice_mut(numbers).copy_from_slice(bytes),
            Wire::Bf16 => numbers.iter_mut().zip(bytes.as_chunks::<2>().0).for_each(|(x, b)| *x = bf16::from_ne_bytes(*b).to_f32()),
        }
        Ok(())
    }
}

impl fmt::Display for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Wire::F32 => "f32",
            Wire::Bf16 => "bf16",
        })
    }
}

impl std::str::FromStr for Wire {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "f32" => Ok(Wire::F32),
            "bf16" => Ok(Wire::Bf16),
            _ => Err(Error::usage(format!("gradients are not sent in {name}; use f32 or bf16"))),
        }
    }
}

/// What a rank says of a call, to be compared: its number, and what it is about.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Announced {
    pub number: u64,
    pub text: String,
}

impl Announced {
    pub fn of(number: u64, call: &Call, bytes: usize) -> Self {
        let size = if call.kind.is_even() { format!(", {bytes} bytes") } else { String::new() };
        Self { number, text: format!("{} ({}{size})", call.what, call.kind.name()) }
    }

    /// Whether rank `rank` makes the call that rank 0 makes.
    pub fn check(&self, rank: usize, first: &Announced) -> Result<()> {
        ensure!(
            self == first,
            "rank {rank} has come to {} where rank 0 has come to {}: they no longer do the same; was one of them started with other arguments or other images?",
            self.text,
            first.text
        );
        Ok(())
    }
}

/// What is said of a rank that does not come.
pub fn late(rank: usize, what: &str, patience: Duration) -> String {
    format!(
        "rank {rank} has not come to {what} for {:.0} s; see whether it still runs, or give --rank-timeout more",
        patience.as_secs_f64()
    )
}

/// What comes of a call, of which every rank gets its piece, in memory that may have been used before.
pub fn combine(kind: Kind, given: &[&[u8]], whole: &mut Vec<u8>) -> Result<()> {
    whole.clear();
    match kind {
        Kind::Gather | Kind::Collect => {
            whole.reserve(given.iter().map(|bytes| 8 + bytes.len()).sum());
            given.iter().for_each(|bytes| whole.extend_from_slice(&(bytes.len() as u64).to_le_bytes()));
            given.iter().for_each(|bytes| whole.extend_from_slice(bytes));
        }
        Kind::Broadcast => whole.extend_from_slice(given[0]),
        Kind::Share => given.iter().for_each(|bytes| whole.extend_from_slice(bytes)),
        Kind::Sum(wire) | Kind::SumParts(wire, _) => {
            let even = given.iter().all(|bytes| bytes.len() == given[0].len() && bytes.len().is_multiple_of(wire.bytes()));
            ensure!(even, "ranks gave other numbers of numbers to be summed");
            whole.extend_from_slice(given[0]);
            match wire {
                Wire::F32 => given[1..].iter().for_each(|bytes| add(whole, bytes)),
                Wire::Bf16 => {
                    let (sums, _) = whole.as_chunks_mut::<2>();
                    for (at, sum) in sums.iter_mut().enumerate() {
                        let one = |bytes: &&[u8]| bf16::from_ne_bytes([bytes[2 * at], bytes[2 * at + 1]]).to_f32();
                        let all = given[1..].iter().map(one).fold(bf16::from_ne_bytes(*sum).to_f32(), |sum, x| sum + x);
                        *sum = bf16::from_f32(all).to_ne_bytes();
                    }
                }
            }
        }
    }
    Ok(())
}

/// Adds f32 numbers to others, as bytes.
fn add(sums: &mut [u8], bytes: &[u8]) {
    for (sum, x) in sums.as_chunks_mut::<4>().0.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *sum = (f32::from_ne_bytes(*sum) + f32::from_ne_bytes(*x)).to_ne_bytes();
    }
}

/// The piece of what came of a call that a rank gets.
pub fn piece<'a>(kind: Kind, rank: usize, whole: &'a [u8]) -> &'a [u8] {
    match kind {
        Kind::SumParts(wire, parts) => &whole[parts[rank].start * wire.bytes()..parts[rank].end * wire.bytes()],
        Kind::Collect if rank > 0 => &[],
        _ => whole,
    }
}

/// What was gathered, rank by rank.
pub fn split(bytes: &[u8], world: usize) -> Result<Vec<Vec<u8>>> {
    let broken = || Error::new("what was gathered from the ranks is cut short");
    let (lengths, mut rest) = bytes.split_at_checked(8 * world).ok_or_else(broken)?;
    let mut all = Vec::with_capacity(world);
    for length in lengths.as_chunks::<8>().0 {
        let (mine, others) = usize::try_from(u64::from_le_bytes(*length)).ok().and_then(|n| rest.split_at_checked(n)).ok_or_else(broken)?;
        all.push(mine.to_vec());
        rest = others;
    }
    if !rest.is_empty() {
        bail!("what was gathered from the ranks has {} bytes too many", rest.len());
    }
    Ok(all)
}
