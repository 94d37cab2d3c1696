//! kube-apiserver's static token file.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::UserInfo;

/// Largest token file that is read.
const MAX_FILE: u64 = 4 << 20;

/// Users by the hash of their token: looking up a hash takes the same time whatever the guess.
#[derive(Clone, Default)]
pub struct TokenFile(HashMap<[u8; 32], UserInfo>);

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

impl TokenFile {
    /// Reads a file.
    pub fn read(path: &Path) -> Result<Self, TokenFileError> {
        let name = path.display().to_string();
        let failed = |source| TokenFileError::Read { path: name.clone(), source };
        let size = std::fs::metadata(path).map_err(failed)?.len();
        if size > MAX_FILE {
            return Err(TokenFileError::TooLarge { path: name, size });
        }
        Self::parse(&std::fs::read_to_string(path).map_err(failed)?)
    }

    /// Parses `token,user,uid[,"group1,group2"]` lines.
    pub fn parse(text: &str) -> Result<Self, TokenFileError> {
        let mut users = HashMap::new();
        for (i, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let fields = split_csv(line);
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
            let info = UserInfo { name: user.clone(), uid: uid.clone(), groups, extra: Default::default() };
            users.insert(Sha256::digest(token.as_bytes()).into(), info);
        }
        Ok(Self(users))
    }

    /// The user of a token.
    pub fn user(&self, token: &str) -> Option<UserInfo> {
        let hash: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        self.0.get(&hash).cloned()
    }
}

impl fmt::Debug for TokenFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TokenFile({} users)", self.0.len())
    }
}

fn split_csv(line: &str) -> Vec<String> {
    let (mut fields, mut field, mut quoted) = (Vec::new(), String::new(), false);
    for c in line.chars() {
        match c {
            '"' => quoted = !quoted,
            ',' if !quoted => fields.push(std::mem::take(&mut field).trim().to_owned()),
            c => field.push(c),
        }
    }
    fields.push(field.trim().to_owned());
    fields
}
