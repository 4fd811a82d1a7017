//! Floor 7: training, and what a person sees of it.

pub mod args;
pub mod chart;
pub mod checkpoint;
pub mod classify;
pub mod evaluate;
pub mod events;
pub mod feed;
pub mod images;
pub mod knn;
pub mod model;
pub mod picture;
pub mod pretrain;
pub mod progress;
pub mod record;
pub mod report;
pub mod run;
pub mod signals;
pub mod step;
pub mod visualize;
