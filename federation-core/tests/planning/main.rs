//! Planning over whole histories: stories, and properties of random ones.

mod edges;
mod properties;
mod stories;
mod world;
