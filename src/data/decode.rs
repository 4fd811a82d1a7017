//! A file's bytes to a picture of 8-bit RGB.

use super::Picture;
use crate::error::{Context, Result};
use std::io::Cursor;

/// Decodes a JPEG, PNG, WebP or BMP, told apart by content.
pub fn decode(bytes: &[u8]) -> Result<Picture> {
    let reader = image::ImageReader::new(Cursor::new(bytes)).with_guessed_format().context("the image cannot be read")?;
    let pixels = reader.decode().context("the image cannot be decoded")?.to_rgb8();
    let size = [pixels.height() as usize, pixels.width() as usize];
    Picture::new(size, 3, pixels.into_raw())
}
