//! Named tensors on disk: the public checkpoint files, hostile files, and what is written.

#[path = "formats/build.rs"]
mod build;
#[path = "formats/cases.rs"]
mod cases;
#[path = "formats/hostile.rs"]
mod hostile;
#[path = "formats/public.rs"]
mod public;
#[path = "formats/written.rs"]
mod written;
