//! The proxy agent: dials out from a member and connects to its services.
