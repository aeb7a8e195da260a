//! Files and directories that appear whole or not at all: written beside the target, synced, then renamed.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use tempfile::{NamedTempFile, TempDir};

use crate::{Error, Result};

/// Writes a file through `write` so that `path` holds the old or the new content, never a part.
pub fn write_atomic_with(path: &Path, write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> Result<()> {
    let parent = parent(path);
    fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
    let mut temp = NamedTempFile::with_prefix_in(".terrarium-", parent).map_err(Error::io("write in", parent))?;
    // Tensors are written one by one: small ones must not each cost a system call.
    let mut buffered = std::io::BufWriter::with_capacity(1 << 20, temp.as_file_mut());
    write(&mut buffered).and_then(|()| buffered.flush()).map_err(Error::io("write", path))?;
    drop(buffered);
    share(temp.as_file()).and_then(|()| temp.as_file().sync_all()).map_err(Error::io("write", path))?;
    temp.persist(path).map_err(|e| Error::io("write", path)(e.error))?;
    sync_dir(parent);
    Ok(())
}

/// Writes `bytes` to `path` so that it holds the old or the new content, never a part.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomic_with(path, |out| out.write_all(bytes))
}

/// A directory being written beside its target. Dropped without [`StagedDir::commit`], it is removed.
pub struct StagedDir {
    temp: TempDir,
    target: PathBuf,
}

impl StagedDir {
    /// Starts a directory that is to become `target`. A target that is a file is refused now rather than after the work.
    pub fn new(target: &Path) -> Result<Self> {
        if target.exists() && !target.is_dir() {
            let reason = "is a file, and a directory is to be written here; choose another name".to_string();
            return Err(Error::Target { path: target.to_path_buf(), reason });
        }
        let parent = parent(target);
        fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        let name = target.file_name().and_then(|n| n.to_str()).unwrap_or("model");
        let temp = TempDir::with_prefix_in(format!(".{name}-"), parent).map_err(Error::io("write in", parent))?;
        Ok(Self { temp, target: target.to_path_buf() })
    }

    /// Where to write the files.
    pub fn path(&self) -> &Path {
        self.temp.path()
    }

    /// Makes the target hold the staged files. A fresh target appears in one rename. In an existing one each file is
    /// replaced by a rename and weights of an earlier save (`model*.safetensors`, the index) that have no successor
    /// are removed; other files stay. By now all bytes are on the disk, so a full one cannot stop this half-way.
    pub fn commit(self) -> Result<()> {
        let staged = files_below(self.path())?;
        for file in &staged {
            let path = self.path().join(file);
            let handle = File::open(&path).map_err(Error::io("sync", &path))?;
            share(&handle).and_then(|()| handle.sync_all()).map_err(Error::io("sync", &path))?;
        }
        sync_dir(self.path());
        let fresh = match fs::read_dir(&self.target) {
            Ok(mut entries) => entries.next().is_none(),
            Err(_) => true,
        };
        if fresh { self.rename_whole() } else { self.replace_files(&staged) }
    }

    fn rename_whole(self) -> Result<()> {
        // An empty directory in the way: rename replaces it on Unix, not on Windows.
        if self.target.exists() {
            fs::remove_dir(&self.target).map_err(Error::io("replace", &self.target))?;
        }
        open_to_others(self.temp.path());
        fs::rename(self.temp.path(), &self.target).map_err(Error::io("write", &self.target))?;
        // It is not there any more under its temporary name: nothing to remove.
        let _ = self.temp.keep();
        sync_dir(parent(&self.target));
        Ok(())
    }

    fn replace_files(self, staged: &[PathBuf]) -> Result<()> {
        for file in staged {
            let (from, to) = (self.path().join(file), self.target.join(file));
            let folder = parent(&to);
            fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
            fs::rename(&from, &to).map_err(Error::io("replace", &to))?;
        }
        for name in old_weights(&self.target)? {
            if !staged.iter().any(|file| file == Path::new(&name)) {
                let path = self.target.join(&name);
                fs::remove_file(&path).map_err(Error::io("remove", &path))?;
            }
        }
        sync_dir(&self.target);
        Ok(())
    }
}

/// Names of weights in `dir` as [`crate::save`] writes them.
fn old_weights(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let name = entry.map_err(Error::io("list", dir))?.file_name().to_string_lossy().into_owned();
        let shard = name.starts_with("model-") && name.contains("-of-") && name.ends_with(".safetensors");
        if shard || name == "model.safetensors" || name == "model.safetensors.index.json" {
            names.push(name);
        }
    }
    Ok(names)
}

fn files_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut open = vec![PathBuf::new()];
    while let Some(sub) = open.pop() {
        let path = dir.join(&sub);
        for entry in fs::read_dir(&path).map_err(Error::io("list", &path))? {
            let entry = entry.map_err(Error::io("list", &path))?;
            let name = sub.join(entry.file_name());
            if entry.path().is_dir() {
                open.push(name);
            } else {
                found.push(name);
            }
        }
    }
    found.sort();
    Ok(found)
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Makes a rename survive a power cut, where directories can be synced.
fn sync_dir(dir: &Path) {
    if let Ok(handle) = File::open(dir) {
        let _ = handle.sync_all();
    }
}

/// Temporary files are private to their owner; a model is as readable as any other new file.
#[cfg(unix)]
fn share(file: &File) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(fs::Permissions::from_mode(0o644))
}

#[cfg(not(unix))]
fn share(_file: &File) -> std::io::Result<()> {
    Ok(())
}

#[cfg(unix)]
fn open_to_others(dir: &Path) {
    use std::os::unix::fs::PermissionsExt;
    let _ = fs::set_permissions(dir, fs::Permissions::from_mode(0o755));
}

#[cfg(not(unix))]
fn open_to_others(_dir: &Path) {}
