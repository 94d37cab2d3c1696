//! kube-apiserver's static token file. It is followed: a token that is taken out is worth nothing from then on, and what was
//! begun with it ends.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::UserInfo;
use crate::followed::FromFile;

/// Largest token file that is read.
const MAX_FILE: u64 = 4 << 20;

/// Users by the hash of their token: looking up a hash takes the same time whatever the guess.
#[derive(Clone, Default)]
pub struct TokenFile(HashMap<[u8; 32], Known>);

/// Whose a token is, and what ends when it is taken out.
#[derive(Clone)]
struct Known {
    user: UserInfo,
    end: CancellationToken,
}

/// The token file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenFileError {
    #[error("failed to read token file {path}: check the path and its permissions")]
    Read {
        path: String,
        #[source]
        source: std::io::Error,
    },
    #[error("token file {path} has {size} bytes: at most {MAX_FILE} are read")]
    TooLarge { path: String, size: u64 },
    #[error("failed to parse line {line} of the token file: write `token,user,uid[,\"group1,group2\"]`")]
    Line { line: usize },
}

// === impl TokenFile ===

impl FromFile for TokenFile {
    type Error = TokenFileError;
    const WHAT: &'static str = "token file";

    fn read(path: &Path) -> Result<Self, TokenFileError> {
        let name = path.display().to_string();
        let failed = |source| TokenFileError::Read { path: name.clone(), source };
        let size = std::fs::metadata(path).map_err(failed)?.len();
        if size > MAX_FILE {
            return Err(TokenFileError::TooLarge { path: name, size });
        }
        Self::parse(&std::fs::read_to_string(path).map_err(failed)?)
    }

    fn succeed(mut self, former: &Self) -> Self {
        for (hash, was) in &former.0 {
            match self.0.get_mut(hash) {
                Some(is) if is.user == was.user => is.end = was.end.clone(),
                _ => was.end.cancel(),
            }
        }
        self
    }
}

impl TokenFile {
    /// Parses `token,user,uid[,"group1,group2"]` lines.
    pub fn parse(text: &str) -> Result<Self, TokenFileError> {
        let mut users = HashMap::new();
        for (i, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let fields = split_csv(line).unwrap_or_default();
            let [token, user, uid, rest @ ..] = fields.as_slice() else {
                return Err(TokenFileError::Line { line: i + 1 });
            };
            if token.is_empty() || user.is_empty() {
                return Err(TokenFileError::Line { line: i + 1 });
            }
            let groups = rest
                .first()
                .map(|g| g.split(',').map(str::trim).filter(|g| !g.is_empty()).map(str::to_owned).collect())
                .unwrap_or_default();
            let user = UserInfo { name: user.clone(), uid: uid.clone(), groups, extra: Default::default() };
            let known = Known { user, end: CancellationToken::new() };
            users.insert(Sha256::digest(token.as_bytes()).into(), known);
        }
        Ok(Self(users))
    }

    /// The user of a token, and what is cancelled when the token is taken out.
    pub fn user(&self, token: &str) -> Option<(UserInfo, CancellationToken)> {
        let hash: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        self.0.get(&hash).map(|known| (known.user.clone(), known.end.clone()))
    }
}

impl PartialEq for TokenFile {
    fn eq(&self, other: &Self) -> bool {
        let is_there = |(hash, known): (&[u8; 32], &Known)| {
            other.0.get(hash).is_some_and(|there| there.user == known.user)
        };
        self.0.len() == other.0.len() && self.0.iter().all(is_there)
    }
}

impl fmt::Debug for TokenFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TokenFile({} users)", self.0.len())
    }
}

/// `None` where a quote is not closed: a line that was cut there would put its user into groups that nobody named.
fn split_csv(line: &str) -> Option<Vec<String>> {
    let (mut fields, mut field, mut quoted) = (Vec::new(), String::new(), false);
    for c in line.chars() {
        match c {
            '"' => quoted = !quoted,
            ',' if !quoted => fields.push(std::mem::take(&mut field).trim().to_owned()),
            c => field.push(c),
        }
    }
    fields.push(field.trim().to_owned());
    (!quoted).then_some(fields)
}
