//! The tunnel: HTTP/2 and QUIC carriers, sessions, connections, relay.
