//! Floor 7: training, and what a person sees of it.
//!
//! | module | what it is |
//! |---|---|
//! | [`pretrain`], [`classify`] and one for each other method | the commands that train, turned into a [`run`] |
//! | [`args`], [`images`] | the flags that they share |
//! | [`start`] | where a run writes, what it goes on from |
//! | [`place`] | where a run stands |
//! | [`run`] | the one loop: what it does next, what it does when numbers are not finite |
//! | [`step`] | forward, backward and update, recorded on a GPU and replayed |
//! | [`exchange`] | one model on many ranks: gradients go round while the backward pass runs |
//! | [`profile`] | what was done when in a few updates, as a file and a table |
//! | [`feed`] | from bytes to what a step takes |
//! | [`checkpoint`], [`signals`] | what survives, and when it is saved |
//! | [`evaluate`], [`knn`] | how good a model is |
//! | [`model`] | a model out of a checkpoint, whoever wrote it |
//! | [`record`], [`events`], [`progress`] | the rows of a run, TensorBoard's files, the line on the terminal |
//! | [`visualize`], [`predicted`], [`picture`], [`chart`], [`report`] | pictures, curves, and the page that shows them |

pub mod args;
pub mod augment;
pub mod cache;
pub mod chart;
pub mod checkpoint;
pub mod classify;
pub mod convmae;
pub mod distill;
pub mod dmae;
pub mod dmjd;
pub mod evaluate;
pub mod events;
pub mod exchange;
pub mod feed;
pub mod images;
pub mod knn;
pub mod maskfeat;
pub mod model;
pub mod official;
pub mod picture;
pub mod place;
pub mod predicted;
pub mod pretrain;
pub mod profile;
pub mod progress;
pub mod record;
pub mod report;
pub mod run;
pub mod signals;
pub mod start;
pub mod step;
pub mod target;
pub mod teacher;
pub mod tinymim;
pub mod visualize;
