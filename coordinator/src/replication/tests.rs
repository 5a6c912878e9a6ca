//! Replication's promises, by whole groups in one process: real directories, real loopback connections, cut at will.

mod cluster;
mod disk;
mod groups;
mod state;
