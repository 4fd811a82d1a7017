//! Many processes that train one model.
//!
//! | module | what it is |
//! |---|---|
//! | [`environment`] | who started this process, and which of how many it is |

pub mod environment;
