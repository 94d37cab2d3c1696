//! Planning over whole histories: stories, and properties of random ones.

mod edges;
mod failover;
mod properties;
mod replicas;
mod stories;
mod world;
