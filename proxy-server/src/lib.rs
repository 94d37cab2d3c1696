//! The proxy server: holds members' tunnels and reaches back through them.
