//! Floor 5: images on their way to a model.
//!
//! A [`Dataset`] gives pictures by number, a [`transform`] makes each a row of a batch with numbers drawn from its own stream, the [`loader`] does so in
//! parallel and ahead of time, and [`augment`] turns the batch of bytes into normalised images on the device that computes.
//!
//! | module | what it is |
//! |---|---|
//! | [`open`] | a set by its path: what lies there tells what it is |
//! | [`folder`] | a folder a class |
//! | [`cifar`] | CIFAR-10 and CIFAR-100 |
//! | [`synthetic`] | the built-in pictures |
//! | [`cache`] | a small set kept in memory |
//! | [`decode`] | encoded images to bytes |
//! | `resample` | the two passes of a resize |
//! | [`packed`] | a set in one file, checksummed and mapped |
//! | [`resize`] | crop, bicubic resize and flip, Pillow's bytes exactly |
//! | [`crop`] | which part of a picture is seen |
//! | [`colour`], [`filter`], [`affine`] | changes of colours, filters, affine maps, Pillow's bytes exactly |
//! | [`rand_augment`], [`three_augment`] | which of them an image meets |
//! | [`erase`] | boxes that are erased |
//! | [`transform`] | what happens to one picture, by recipe |
//! | [`order`] | the order of an epoch |
//! | [`loader`] | batches of an epoch, prefetched |
//! | `assemble`, `workers` | rows of a batch, and the threads that make them |
//! | [`mixing`], [`mixup`] | a batch blended with itself: the draws, the arithmetic |
//! | [`augment`] | bytes to normalised images: erasing, mixing |

pub mod affine;
mod assemble;
pub mod augment;
pub mod cache;
pub mod cifar;
pub mod colour;
pub mod crop;
pub mod decode;
pub mod erase;
pub mod filter;
pub mod folder;
pub mod loader;
pub mod mixing;
pub mod mixup;
pub mod open;
pub mod order;
pub mod packed;
pub mod rand_augment;
mod resample;
pub mod resize;
pub mod synthetic;
pub mod three_augment;
pub mod transform;
mod workers;

use crate::ensure;
use crate::error::Result;

/// An image as bytes [H, W, C], the channel fastest.
#[derive(Clone, Debug, PartialEq)]
pub struct Picture {
    /// Height and width.
    pub size: [usize; 2],
    pub channels: usize,
    pub pixels: Vec<u8>,
}

impl Picture {
    pub fn new(size: [usize; 2], channels: usize, pixels: Vec<u8>) -> Result<Self> {
        let wanted = size[0].checked_mul(size[1]).and_then(|area| area.checked_mul(channels));
        ensure!(
            wanted == Some(pixels.len()) && !pixels.is_empty(),
            "{} bytes are no image of {} x {} pixels with {channels} channels",
            pixels.len(),
            size[0],
            size[1]
        );
        Ok(Self { size, channels, pixels })
    }
}

/// Labelled images by number. Reading one may fail; what the set holds may not change.
pub trait Dataset: Send + Sync {
    fn len(&self) -> usize;

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Names of the classes; the label of an image is a position among them.
    fn classes(&self) -> &[String];

    fn label(&self, index: usize) -> u32;

    /// What names the image in a message: a path, a row of a file.
    fn name(&self, index: usize) -> String;

    /// The image, decoded; the error names it.
    fn picture(&self, index: usize) -> Result<Picture>;

    /// What a person should know of the set before it is used, a sentence each.
    fn notes(&self) -> &[String] {
        &[]
    }

    /// The image as its file holds it (a JPEG), where it has a file of its own.
    fn encoded(&self, _index: usize) -> Result<Option<Vec<u8>>> {
        Ok(None)
    }
}
