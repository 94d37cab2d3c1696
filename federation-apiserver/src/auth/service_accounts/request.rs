//! `serviceaccounts/token`: a token on request, `kubectl create token`.

use serde_json::{Value, json};

use super::ServiceAccounts;
use crate::registry::Target;
use crate::status::{ApiError, FieldError};
use crate::value::{at, i64_at, set, str_at};

/// Bounds of a token's life in seconds, and what it is when not asked for: as in kube-apiserver.
const MIN_EXPIRATION: i64 = 600;
const MAX_EXPIRATION: i64 = 1 << 32;
const DEFAULT_EXPIRATION: i64 = 3600;
/// Audiences of one token: each is a string in every request that uses it.
const MAX_AUDIENCES: usize = 64;

// === impl ServiceAccounts ===

impl ServiceAccounts {
    /// Answers a TokenRequest for the account that `target` names.
    pub(crate) async fn request(
        &self,
        target: &Target,
        mut body: Value,
        now: jiff::Timestamp,
    ) -> Result<Value, ApiError> {
        let kind = str_at(&body, &["kind"]);
        if !kind.is_empty() && kind != "TokenRequest" {
            return Err(ApiError::bad_request(format!("{kind} cannot be handled as a TokenRequest")));
        }
        if body.is_null() {
            body = json!({});
        }
        let account = self.registry.get(target).await?.object;
        let invalid =
            |error: FieldError| ApiError::invalid("authentication.k8s.io", "TokenRequest", "", &[error]);
        let asked = i64_at(&body, &["spec", "expirationSeconds"]).unwrap_or(DEFAULT_EXPIRATION);
        let field = "spec.expirationSeconds";
        if asked < MIN_EXPIRATION {
            let why = "may not specify a duration less than 10 minutes";
            return Err(invalid(FieldError::invalid(field, &json!(asked), why)));
        }
        if asked > MAX_EXPIRATION {
            let why = "may not specify a duration larger than 2^32 seconds";
            return Err(invalid(FieldError::invalid(field, &json!(asked), why)));
        }
        let longest = self.max_expiration.map_or(i64::MAX, |max| i64::try_from(max).unwrap_or(i64::MAX));
        let life = asked.min(longest);
        let mut audiences = super::strings(at(&body, &["spec", "audiences"]));
        if audiences.is_empty() {
            audiences.clone_from(&self.audiences);
        }
        if audiences.len() > MAX_AUDIENCES {
            let why = format!("may name at most {MAX_AUDIENCES} audiences");
            return Err(invalid(FieldError::too_long("spec.audiences", why)));
        }
        let mut private = json!({"namespace": target.namespace, "serviceaccount":
            {"name": target.name, "uid": str_at(&account, &["metadata", "uid"])}});
        if let Some(bound) = at(&body, &["spec", "boundObjectRef"]).filter(|b| b.is_object()) {
            self.bind(target, bound, &mut private).await?;
        }
        let from = now.as_second();
        let claims = json!({
            "iss": self.issuers.first(), "aud": audiences, "iat": from, "nbf": from, "exp": from + life,
            "jti": uuid::Uuid::new_v4().to_string(), "kubernetes.io": private,
            "sub": format!("{}{}:{}", crate::auth::impersonation::SERVICE_ACCOUNT, target.namespace, target.name),
        });
        let token = self.keys.sign(&claims).map_err(ApiError::internal)?;
        let until = now.checked_add(jiff::SignedDuration::from_secs(life)).map_err(ApiError::internal)?;
        set(&mut body, &["apiVersion"], json!("authentication.k8s.io/v1"));
        set(&mut body, &["kind"], json!("TokenRequest"));
        set(&mut body, &["metadata", "name"], json!(target.name));
        set(&mut body, &["metadata", "namespace"], json!(target.namespace));
        set(&mut body, &["metadata", "uid"], json!(str_at(&account, &["metadata", "uid"])));
        set(
            &mut body,
            &["metadata", "creationTimestamp"],
            json!(now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()),
        );
        set(&mut body, &["spec", "audiences"], json!(audiences));
        set(&mut body, &["spec", "expirationSeconds"], json!(life));
        let until = until.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        body["status"] = json!({"token": token, "expirationTimestamp": until});
        Ok(body)
    }

    /// Adds the object that the token is to live and die with.
    async fn bind(&self, target: &Target, bound: &Value, private: &mut Value) -> Result<(), ApiError> {
        let (version, kind) = (str_at(bound, &["apiVersion"]), str_at(bound, &["kind"]));
        let (name, uid) = (str_at(bound, &["name"]), str_at(bound, &["uid"]));
        let plural = match (version, kind) {
            ("v1", "Pod") => "pods",
            ("v1", "Secret") => "secrets",
            ("v1", "Node") => "nodes",
            _ => {
                return Err(ApiError::bad_request(format!(
                    "cannot bind token to object of type {version}, Kind={kind}"
                )));
            }
        };
        let namespace = if kind == "Node" { "" } else { target.namespace.as_str() };
        // A hub has no pods and nodes: then there is none of that name either.
        let found = match self.registry.core(plural, namespace, name) {
            Ok(of) => self.registry.get(&of).await?.object,
            Err(_) => return Err(ApiError::not_found("", plural, name)),
        };
        if kind == "Pod" && str_at(&found, &["spec", "serviceAccountName"]) != target.name {
            return Err(ApiError::bad_request(format!(
                "cannot bind token for serviceaccount {:?} to pod running with different serviceaccount name.",
                target.name
            )));
        }
        let real = str_at(&found, &["metadata", "uid"]);
        if !uid.is_empty() && uid != real {
            let why = format!(
                "the UID in the bound object reference ({uid}) does not match the UID in record. The object might have been deleted and then recreated"
            );
            return Err(ApiError::conflict("", plural, name, &why));
        }
        private[kind.to_lowercase()] = json!({"name": name, "uid": real});
        if kind == "Pod" {
            let node = str_at(&found, &["spec", "nodeName"]);
            if !node.is_empty()
                && let Ok(of) = self.registry.core("nodes", "", node)
                && let Ok(found) = self.registry.get(&of).await
            {
                private["node"] = json!({"name": node, "uid": str_at(&found.object, &["metadata", "uid"])});
            }
        }
        Ok(())
    }
}
