//! What tests share: namespaces, impairment relay, fetched programs, waiting.
