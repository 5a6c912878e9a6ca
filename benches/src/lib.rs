//! What the benchmark programs share. Belongs here: how a figure is drawn or written down. Does not belong here: what is measured
//! (`bin/`).

pub mod plot;
