//! ext4 on a loop device over a file.
//!
//! A cut tells ext4 to shut down without writing its journal or anything else (`EXT4_IOC_SHUTDOWN` with
//! `EXT4_GOING_FLAGS_NOLOGFLUSH`); the next mount replays what the journal holds, as after a real one.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use rustix::{fs::statvfs, ioctl};

use crate::{cluster::Error, host::run_tool};

/// Size of the disk, of which the file takes only what is written.
const CAPACITY: u64 = 3 << 30;
/// `_IOR('X', 125, __u32)`, from linux/ext4.h.
const SHUTDOWN: ioctl::Opcode = ioctl::opcode::read::<u32>(b'X', 125);
/// `EXT4_GOING_FLAGS_NOLOGFLUSH`.
const NO_LOG_FLUSH: u32 = 2;
/// Takes the space of a full disk.
const BALLAST: &str = "ballast";

/// A mounted ext4.
pub struct Ext4 {
    image: PathBuf,
    mount: PathBuf,
}

fn wrong(path: &Path) -> impl Fn(std::io::Error) -> Error {
    let path = path.display().to_string();
    move |error| Error::new(format!("disk {path}: {error}"))
}

impl Ext4 {
    /// Makes a file system in the file `image` and mounts it.
    ///
    /// # Errors
    /// What mkfs or mount say.
    pub async fn create(image: &Path, mount: &Path) -> Result<Self, Error> {
        let file = File::create(image).map_err(wrong(image))?;
        file.set_len(CAPACITY).map_err(wrong(image))?;
        let text = image.display().to_string();
        // The file is new and reads as zeros: nothing needs to be written that says so.
        let as_it_is = "lazy_itable_init=1,lazy_journal_init=1,nodiscard";
        run_tool("mkfs.ext4", &["-q", "-F", "-m", "0", "-E", as_it_is, &text], "").await?;
        let disk = Self { image: image.to_owned(), mount: mount.to_owned() };
        disk.attach().await?;
        Ok(disk)
    }

    async fn attach(&self) -> Result<(), Error> {
        let (image, mount) = (self.image.display().to_string(), self.mount.display().to_string());
        run_tool("mount", &["-t", "ext4", "-o", "loop,noatime", &image, &mount], "").await.map(|_| ())
    }

    /// What is not on the disk now is lost.
    ///
    /// # Errors
    /// The disk is not there.
    pub fn off(&self) -> Result<(), Error> {
        let root = File::open(&self.mount).map_err(wrong(&self.mount))?;
        shut_down(&root).map_err(|error| wrong(&self.mount)(error.into()))
    }

    /// Comes back after [`Ext4::off`]; nobody may use the disk any more.
    ///
    /// # Errors
    /// It is in use, or does not mount again.
    pub async fn restore(&self) -> Result<(), Error> {
        run_tool("umount", &[&self.mount.display().to_string()], "").await?;
        self.attach().await
    }

    /// Takes all space that is left. Gives how many bytes there are still.
    ///
    /// # Errors
    /// The disk is not there.
    pub fn fill(&self) -> Result<u64, Error> {
        let path = self.mount.join(BALLAST);
        let ballast = File::create(&path).map_err(wrong(&path))?;
        let mut size = 0;
        for step in [256 << 20, 16 << 20, 1 << 20, 4096] {
            let take = rustix::fs::FallocateFlags::empty();
            while rustix::fs::fallocate(&ballast, take, size, step).is_ok() {
                size += step;
            }
        }
        let left = statvfs(&self.mount).map_err(|error| wrong(&path)(error.into()))?;
        Ok(left.f_bavail * left.f_frsize)
    }

    /// Gives the space back.
    ///
    /// # Errors
    /// The disk is not there.
    pub fn unfill(&self) -> Result<(), Error> {
        fs::remove_file(self.mount.join(BALLAST)).map_err(wrong(&self.mount))
    }
}

fn shut_down(root: &File) -> rustix::io::Result<()> {
    // SAFETY: the operation reads one u32 from the pointer that it is given, which is what `Setter` passes,
    // and writes nothing to memory of this process.
    unsafe { ioctl::ioctl(root, ioctl::Setter::<SHUTDOWN, u32>::new(NO_LOG_FLUSH)) }
}
