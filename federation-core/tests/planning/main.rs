//! Planning over whole histories: stories, and properties of random ones.

mod edges;
mod failover;
mod masks;
mod properties;
mod removal;
mod replicas;
mod stories;
mod world;
