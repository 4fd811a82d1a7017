//! Encoded images to bytes: JPEG, PNG, WebP and BMP, told apart by what they hold and not by their names.
//!
//! The result is what Pillow's `convert("RGB")` gives:
//!
//!   grey         three equal channels; 1, 2 and 4 bits are spread over 0..=255
//!   palette      looked up
//!   alpha        dropped, not blended: the colour of a transparent pixel is the one in the file
//!   16 bits      the upper byte; a grey image without alpha is instead cut off at 255, as Pillow 11 does
//!   CMYK, YCCK   stored inverted, as Adobe's programs do: red = K - (255 - C) K / 255, and so on
//!
//! Orientation in EXIF, colour profiles and gamma are not applied. PNG, WebP without loss and BMP are exact; a JPEG differs from libjpeg's by
//! rounding in the cosine transform and in the upsampling of colour.
//!
//! A file that ends early is an error, also where most of its rows could be had. The size in a header is held against the length of the file
//! before it sizes anything.

use super::Picture;
use crate::error::{Context, Error, Result};
use crate::{bail, ensure};
use image::codecs::{bmp::BmpDecoder, png::PngDecoder, webp::WebPDecoder};
use image::{ColorType, ImageDecoder, Limits};
use std::borrow::Cow;
use std::fs;
use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

/// Above this many pixels Pillow takes an image for an attack.
const MOST_PIXELS: u64 = 178_956_970;
/// So many pixels may come from a file of any length.
const FREE_PIXELS: u64 = 1 << 22;
/// What a decoder may take for itself besides rows of pixels.
const SCRATCH: u64 = 256 << 20;

/// Bytes of the longest file that is read.
const LONGEST: u64 = 1 << 30;

#[derive(Clone, Copy, PartialEq, Debug)]
enum Format {
    Jpeg,
    Png,
    Webp,
    Bmp,
}

impl Format {
    fn of(bytes: &[u8]) -> Result<Self> {
        let starts = |magic: &[u8]| bytes.starts_with(magic);
        ensure!(!bytes.is_empty(), "it is empty");
        if starts(b"\xff\xd8\xff") {
            return Ok(Self::Jpeg);
        } else if starts(b"\x89PNG\r\n\x1a\n") {
            return Ok(Self::Png);
        } else if starts(b"RIFF") && bytes.get(8..12) == Some(b"WEBP") {
            return Ok(Self::Webp);
        } else if starts(b"BM") {
            return Ok(Self::Bmp);
        }
        let other = match bytes {
            [b'I', b'I', b'*', 0, ..] | [b'M', b'M', 0, b'*', ..] => "a TIFF image",
            [b'G', b'I', b'F', b'8', ..] => "a GIF image",
            [b'P', b'1'..=b'7', b'\n' | b' ' | b'\r', ..] => "a PNM image",
            [_, _, _, _, b'f', b't', b'y', b'p', ..] => "an AVIF or HEIC image",
            _ => bail!("it is no image that is known here (JPEG, PNG, WebP and BMP are)"),
        };
        bail!("it is {other}, which is not read; convert it to PNG")
    }

    fn name(self) -> &'static str {
        match self {
            Self::Jpeg => "JPEG",
            Self::Png => "PNG",
            Self::Webp => "WebP",
            Self::Bmp => "BMP",
        }
    }

    /// No file of this length holds more pixels, by the densest coding that the format has.
    fn most_pixels(self, bytes: &[u8]) -> u64 {
        let length = bytes.len() as u64;
        let word = |at: usize| bytes.get(at..at + 2).map_or(0, |word| u16::from_le_bytes([word[0], word[1]]) as u64);
        match self {
            // A bit for each block of 64 pixels, and as much again for what shares it.
            Self::Jpeg => length * 1024,
            // Deflate packs 1032 to 1.
            Self::Png => {
                let channels = [1, 1, 3, 1, 2, 1, 4][(bytes.get(25).copied().unwrap_or(0) as usize).min(6)];
                length * 8 * 1032 / (channels * bytes.get(24).copied().unwrap_or(1).max(1) as u64)
            }
            // The oldest header is shorter and knows no packing; packing 0, 3 and 6 is none.
            Self::Bmp if word(14) < 40 => length * 8 / word(24).max(1),
            Self::Bmp if matches!(word(30), 0 | 3 | 6) => length * 8 / word(28).max(1),
            // What is blank packs into next to nothing.
            Self::Bmp | Self::Webp => (length * 10_000).max(FREE_PIXELS),
        }
    }
}

/// The image in a file's bytes. The error says what is wrong with them; whoever has the name of the file adds it.
pub fn decode(bytes: &[u8]) -> Result<Picture> {
    let format = Format::of(bytes)?;
    // The decoders are written never to panic, yet bytes from anywhere go through them for weeks: the one that does costs its image, not the run.
    let decoded = catch_unwind(AssertUnwindSafe(|| match format {
        Format::Jpeg => decode_jpeg(bytes),
        Format::Png => read(format, bytes, PngDecoder::with_limits(Cursor::new(bytes), limits())),
        Format::Webp => read(format, bytes, WebPDecoder::new(Cursor::new(bytes))),
        Format::Bmp => read(format, bytes, BmpDecoder::new(Cursor::new(bytes))),
    }));
    decoded.unwrap_or_else(|_| Err(Error::new("the decoder gave up on it"))).with_context(|| format!("it is a damaged {}", format.name()))
}

/// The image in a file; the error names it.
pub fn open(path: &Path) -> Result<Picture> {
    decode(&read_file(path)?).with_context(|| format!("cannot read the image {}", path.display()))
}

/// The bytes of a file that may hold an image.
pub fn read_file(path: &Path) -> Result<Vec<u8>> {
    let cannot = || format!("cannot read the image {}", path.display());
    // Opening a pipe would wait for whoever writes into it.
    let about = fs::metadata(path).with_context(cannot)?;
    ensure!(about.is_file(), "{}: it is not a regular file", cannot());
    ensure!(about.len() <= LONGEST, "{}: it has {} bytes but at most {LONGEST} are read", cannot(), about.len());
    fs::read(path).with_context(cannot)
}

/// Height and width, from the header alone.
pub fn probe_size(bytes: &[u8]) -> Result<[usize; 2]> {
    fn size<D: ImageDecoder>(decoder: image::ImageResult<D>) -> Result<[u32; 2]> {
        let (width, height) = decoder.map_err(|error| told("its header cannot be read", &error))?.dimensions();
        Ok([height, width])
    }
    let format = Format::of(bytes)?;
    let size = catch_unwind(AssertUnwindSafe(|| match format {
        Format::Jpeg => JpegHeader::read(bytes).map(|header| header.size),
        Format::Png => size(PngDecoder::with_limits(Cursor::new(bytes), limits())),
        Format::Webp => size(WebPDecoder::new(Cursor::new(bytes))),
        Format::Bmp => size(BmpDecoder::new(Cursor::new(bytes))),
    }));
    let size = size.unwrap_or_else(|_| Err(Error::new("the decoder gave up on it")));
    let [height, width] = size.with_context(|| format!("it is a damaged {}", format.name()))?;
    Ok([height as usize, width as usize])
}

fn limits() -> Limits {
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(SCRATCH);
    limits
}

/// Fails if an image of this size cannot be meant.
fn check_size(format: Format, bytes: &[u8], [height, width]: [u32; 2]) -> Result<()> {
    let pixels = height as u64 * width as u64;
    ensure!(pixels > 0, "its header names {width} x {height} pixels, which is no image");
    ensure!(pixels <= MOST_PIXELS, "its header names {width} x {height} pixels but at most {MOST_PIXELS} are read");
    ensure!(
        pixels <= format.most_pixels(bytes),
        "its header names {width} x {height} pixels, more than its {} bytes can hold",
        bytes.len()
    );
    Ok(())
}

fn read<D: ImageDecoder>(format: Format, bytes: &[u8], decoder: image::ImageResult<D>) -> Result<Picture> {
    let mut decoder = decoder.map_err(|error| told("its header cannot be read", &error))?;
    let (width, height) = decoder.dimensions();
    check_size(format, bytes, [height, width])?;
    if let (Format::Webp, Some(&[a, b, c, d])) = (format, bytes.get(4..8)) {
        ensure!(u32::from_le_bytes([a, b, c, d]) as usize <= bytes.len() - 8, "it ends early");
    }
    if format != Format::Png {
        // What a decoder holds beside the image is at most the image over again, four bytes a pixel.
        let mut limits = limits();
        limits.max_alloc = Some(SCRATCH + 8 * width as u64 * height as u64);
        decoder.set_limits(limits).map_err(|error| told("it needs too much memory", &error))?;
    }
    let kind = decoder.color_type();
    let mut pixels = vec![0; decoder.total_bytes() as usize];
    decoder.read_image(&mut pixels).map_err(|error| told("its pixels cannot be read", &error))?;
    let pixels = to_rgb(kind, pixels)?;
    Picture::new([height as usize, width as usize], 3, pixels)
}

/// The decoders' errors tell their causes themselves: as part of a chain they would tell them twice.
fn told(what: &str, error: &dyn std::error::Error) -> Error {
    Error::new(format!("{what} ({error})"))
}

/// Pixels of any kind as red, green and blue.
fn to_rgb(kind: ColorType, pixels: Vec<u8>) -> Result<Vec<u8>> {
    let word = |word: &[u8]| u16::from_ne_bytes([word[0], word[1]]);
    let high = |bytes: &[u8]| (word(bytes) >> 8) as u8;
    Ok(match kind {
        ColorType::Rgb8 => pixels,
        ColorType::L8 => pixels.iter().flat_map(|&grey| [grey; 3]).collect(),
        ColorType::La8 => pixels.chunks_exact(2).flat_map(|pixel| [pixel[0]; 3]).collect(),
        ColorType::Rgba8 => pixels.chunks_exact(4).flat_map(|pixel| [pixel[0], pixel[1], pixel[2]]).collect(),
        ColorType::L16 => pixels.chunks_exact(2).flat_map(|pixel| [word(pixel).min(255) as u8; 3]).collect(),
        ColorType::La16 => pixels.chunks_exact(4).flat_map(|pixel| [high(pixel); 3]).collect(),
        ColorType::Rgb16 => pixels.chunks_exact(2).map(high).collect(),
        ColorType::Rgba16 => pixels.chunks_exact(8).flat_map(|pixel| [high(pixel), high(&pixel[2..]), high(&pixel[4..])]).collect(),
        other => bail!("its pixels are {other:?}, which is not read"),
    })
}

/// What stands before the first scan of a JPEG.
struct JpegHeader {
    /// Height and width.
    size: [u32; 2],
    /// Identifiers of the components.
    components: Vec<u8>,
    jfif: bool,
    /// Where Adobe's note on the transform of colours stands, and what it says.
    adobe: Option<(usize, u8)>,
    /// Where the first scan begins.
    scan: usize,
}

impl JpegHeader {
    fn read(bytes: &[u8]) -> Result<Self> {
        let mut header = Self { size: [0; 2], components: Vec::new(), jfif: false, adobe: None, scan: 0 };
        let mut at = 2;
        loop {
            let Some(&[0xff, marker]) = bytes.get(at..at + 2) else { bail!("its header ends early or is garbled at byte {at}") };
            at += 1;
            if marker == 0xff {
                continue;
            }
            at += 1;
            // Markers without a segment.
            if matches!(marker, 0x01 | 0xd0..=0xd8) {
                continue;
            }
            let length = bytes.get(at..at + 2).map_or(0, |length| u16::from_be_bytes([length[0], length[1]]) as usize);
            let segment = bytes.get(at + 2..at + length.max(2)).filter(|_| length >= 2);
            let Some(segment) = segment else { bail!("its header ends early or is garbled at byte {at}") };
            match (marker, segment) {
                (0xc0..=0xc3 | 0xc5..=0xc7 | 0xc9..=0xcb | 0xcd..=0xcf, &[_, h0, h1, w0, w1, count, ref parts @ ..]) => {
                    header.size = [[h0, h1], [w0, w1]].map(|side| u16::from_be_bytes(side) as u32);
                    header.components = parts.chunks_exact(3).take(count as usize).map(|part| part[0]).collect();
                }
                (0xe0, [b'J', b'F', b'I', b'F', 0, ..]) => header.jfif = true,
                (0xee, &[b'A', b'd', b'o', b'b', b'e', _, _, _, _, _, _, transform, ..]) => header.adobe = Some((at + 13, transform)),
                (0xda, _) => {
                    ensure!(!header.components.is_empty(), "it has no frame before its first scan");
                    header.scan = at;
                    return Ok(header);
                }
                _ => {}
            }
            at += length;
        }
    }

    /// Whether three components are red, green and blue and not YCbCr, told as libjpeg does.
    fn is_rgb(&self) -> bool {
        match self.adobe {
            _ if self.components.len() != 3 || self.jfif => false,
            Some((_, transform)) => transform == 0,
            None => self.components == *b"RGB",
        }
    }
}

fn decode_jpeg(bytes: &[u8]) -> Result<Picture> {
    let header = JpegHeader::read(bytes)?;
    check_size(Format::Jpeg, bytes, header.size)?;
    // Within a scan 0xff stands before a zero or a restart; 0xff 0xd9 ends the image. Looked for from the back, where it is at once.
    ensure!(bytes[header.scan..].windows(2).rev().any(|pair| pair == [0xff, 0xd9]), "it ends early");

    // The decoder takes three components that Adobe calls untransformed for CMYK. It is told the plain transform, and asked for none.
    let mut bytes = Cow::Borrowed(bytes);
    if let Some((at, transform)) = header.adobe
        && header.components.len() == 3
        && transform != 1
    {
        bytes.to_mut()[at] = 1;
    }
    let options = DecoderOptions::default().set_strict_mode(true).set_max_width(65_535).set_max_height(65_535);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes.as_ref()), options.jpeg_set_out_colorspace(ColorSpace::RGB));
    decoder.decode_headers().map_err(|error| told("its header cannot be read", &error))?;
    if header.is_rgb() {
        let kept = decoder.input_colorspace().unwrap_or(ColorSpace::RGB);
        decoder.set_options(options.jpeg_set_out_colorspace(kept));
    }
    let size = decoder.dimensions().map(|(width, height)| [height, width]);
    ensure!(size == Some(header.size.map(|side| side as usize)), "it has two headers that differ in size");
    let mut pixels = vec![0; 3 * header.size[0] as usize * header.size[1] as usize];
    decoder.decode_into(&mut pixels).map_err(|error| told("its pixels cannot be read", &error))?;
    Picture::new(header.size.map(|side| side as usize), 3, pixels)
}
