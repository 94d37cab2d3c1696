//! What every cellway program shares at its edges: flags, logging, signals, drain, readiness, admin server.
