//! Looking for texts in what programs have written: what is secret is to be in no file.

use std::{
    collections::BTreeSet,
    io::{Error, ErrorKind, Result},
    path::{Path, PathBuf},
};

/// The files at and below `paths` that hold one of `texts`. A caller shows that it finds what is there, too.
pub fn files_with(paths: &[impl AsRef<Path>], texts: &[String]) -> Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    let mut paths: Vec<PathBuf> = paths.iter().map(|path| path.as_ref().to_owned()).collect();
    while let Some(path) = paths.pop() {
        match holds(&path, texts, &mut paths) {
            Ok(true) => {
                found.insert(path);
            }
            Ok(false) => {}
            // A program that runs takes files away.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(Error::new(error.kind(), format!("{}: {error}", path.display()))),
        }
    }
    Ok(found)
}

/// Whether it is a file with one of the texts; what is in a folder is added to `more`.
fn holds(path: &Path, texts: &[String], more: &mut Vec<PathBuf>) -> Result<bool> {
    let kind = std::fs::symlink_metadata(path)?.file_type();
    if kind.is_dir() {
        for entry in std::fs::read_dir(path)? {
            more.push(entry?.path());
        }
    }
    if !kind.is_file() {
        return Ok(false);
    }
    let content = std::fs::read(path)?;
    Ok(texts.iter().any(|text| memchr::memmem::find(&content, text.as_bytes()).is_some()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_found_in_files_at_any_depth_whatever_is_around_them() {
        let folder = tempfile::tempdir().unwrap();
        let below = folder.path().join("a").join("b");
        std::fs::create_dir_all(&below).unwrap();
        std::fs::write(below.join("binary"), b"\0\xff\xfesesame\xff").unwrap();
        std::fs::write(folder.path().join("text"), "open").unwrap();
        let found = |paths: &[PathBuf], text: &str| files_with(paths, &["other".to_owned(), text.to_owned()]);
        let all = [folder.path().to_owned(), folder.path().join("not-there")];
        assert_eq!(found(&all, "sesame").unwrap(), BTreeSet::from([below.join("binary")]));
        assert_eq!(found(&[folder.path().join("text")], "open").unwrap().len(), 1);
        assert!(found(&all, "closed").unwrap().is_empty());
    }
}
