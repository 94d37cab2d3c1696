//! What a user may do. RBAC is not served yet; until then there are three classes of users:
//!
//! - `system:masters` and `system:cellway:controllers` may do everything;
//! - other authenticated users may read everything but secrets;
//! - nobody else sees more than health and version.

use super::{CONTROLLERS, MASTERS, UserInfo};

/// May the user do `verb` (get, list, watch, create, …)? `secret`: on secrets of the core group.
pub fn may(user: &UserInfo, verb: &str, secret: bool) -> bool {
    if user.is_in(MASTERS) || user.is_in(CONTROLLERS) {
        return true;
    }
    !user.is_anonymous() && !secret && matches!(verb, "get" | "list" | "watch")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes() {
        let admin = UserInfo::new("a", [MASTERS.to_owned()]);
        let user = UserInfo::new("u", ["system:authenticated".to_owned()]);
        assert!(may(&admin, "delete", true));
        assert!(may(&user, "list", false) && !may(&user, "list", true) && !may(&user, "create", false));
        assert!(!may(&UserInfo::anonymous(), "get", false));
    }
}
