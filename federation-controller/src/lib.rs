//! Watches the hub, acts on members through a connector.
