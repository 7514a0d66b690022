//! Disks of the hosts. Each can lose its power; what is lost then, and what else can go wrong, depends on its kind:
//!
//! | kind | power cut | EIO | full | slow | needs |
//! |---|---|---|---|---|---|
//! | `fuse` | loses or tears what was not synced, by a seed | yes | yes | yes | root, /dev/fuse |
//! | `ext4` | what its journal and fsync did not save | no | yes | no | root, loop devices |
//! | `plain` | no: a directory | no | no | no | nothing |

mod ext4;
mod fuse;
mod program;

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::cluster::Error;
use ext4::Ext4;
use program::Program;

pub use fuse::{Counters, Trouble, serve};

/// Written before each cut and never synced: what is missing of it afterwards was lost in the cut.
const CANARY: &str = "canary";
const CANARY_SIZE: usize = 65_536;
const CANARY_BYTE: u8 = 0xa5;

/// The kinds of disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum DiskKind {
    /// A directory.
    Plain,
    /// ext4 on a loop device.
    Ext4,
    /// A program.
    Fuse,
}

/// What a power cut did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Bytes and names that were there and were lost: the proof.
    pub bytes: u64,
    /// For people.
    pub detail: String,
}

enum Body {
    Plain,
    Ext4(Ext4),
    Fuse(Box<Program>),
}

/// The disk of one host.
pub struct Disk {
    mount: PathBuf,
    body: Body,
}

impl Disk {
    /// A new, empty disk in `dir`; `program` is the one that serves FUSE disks.
    ///
    /// # Errors
    /// The system refuses.
    pub async fn create(kind: DiskKind, dir: &Path, program: &Path) -> Result<Self, Error> {
        let mount = if kind == DiskKind::Plain { dir.to_owned() } else { dir.join("disk") };
        fs::create_dir_all(&mount).map_err(|error| Error::new(format!("cannot make {}: {error}", mount.display())))?;
        let body = match kind {
            DiskKind::Plain => Body::Plain,
            DiskKind::Ext4 => Body::Ext4(Ext4::create(&dir.join("disk.img"), &mount).await?),
            DiskKind::Fuse => Body::Fuse(Box::new(Program::start(program, &dir.join("store"), &mount).await?)),
        };
        Ok(Self { mount, body })
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.mount
    }

    /// Where a node's data is.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        // The root of a disk holds what is not the node's.
        if self.kind() == DiskKind::Plain { self.mount.clone() } else { self.mount.join("data") }
    }

    /// Which kind it is.
    #[must_use]
    pub fn kind(&self) -> DiskKind {
        match self.body {
            Body::Plain => DiskKind::Plain,
            Body::Ext4(_) => DiskKind::Ext4,
            Body::Fuse(_) => DiskKind::Fuse,
        }
    }

    /// The power goes. What uses the disk gets errors from now on.
    ///
    /// # Errors
    /// The disk is not there, or has no power to lose.
    pub async fn off(&mut self) -> Result<(), Error> {
        let canary = self.mount.join(CANARY);
        // A full or failing disk takes no canary; then only what the nodes wrote can prove the cut.
        let _ = tokio::task::spawn_blocking(move || fs::write(canary, [CANARY_BYTE; CANARY_SIZE])).await;
        match &mut self.body {
            Body::Plain => Err(Error::new("a plain directory has no power to lose")),
            Body::Ext4(disk) => disk.off(),
            Body::Fuse(disk) => disk.off().await,
        }
    }

    /// The power comes back after [`Disk::off`]. Nobody may use the disk any more.
    ///
    /// # Errors
    /// The disk is in use, or does not come back.
    pub async fn restore(&mut self, seed: u64) -> Result<Cut, Error> {
        match &mut self.body {
            Body::Plain => Err(Error::new("a plain directory has no power to lose")),
            Body::Ext4(disk) => {
                disk.restore().await?;
                let kept = fs::read(self.mount.join(CANARY)).unwrap_or_default();
                let lost = CANARY_SIZE - kept.iter().filter(|byte| **byte == CANARY_BYTE).count().min(CANARY_SIZE);
                Ok(Cut { bytes: lost as u64, detail: format!("{lost} of {CANARY_SIZE} canary bytes lost") })
            }
            Body::Fuse(disk) => {
                let lost = disk.cut(seed).await?;
                let detail = format!("{} bytes lost, {} pages torn, {} names lost", lost.bytes, lost.torn, lost.names);
                Ok(Cut { bytes: lost.bytes + lost.names, detail })
            }
        }
    }

    /// Makes trouble; see [`Trouble`]. Of a disk that is no program only being full can be had, on ext4.
    ///
    /// # Errors
    /// The disk cannot do that.
    pub async fn trouble(&mut self, trouble: Trouble) -> Result<(), Error> {
        match &mut self.body {
            Body::Fuse(disk) => disk.trouble(trouble).await,
            Body::Ext4(disk) if trouble == Trouble::default() => disk.unfill(),
            Body::Ext4(disk) if trouble == (Trouble { full: true, seed: trouble.seed, ..Trouble::default() }) => {
                match disk.fill()? {
                    0..4096 => Ok(()),
                    left => Err(Error::new(format!("{left} bytes are free after all was taken"))),
                }
            }
            Body::Plain | Body::Ext4(_) => Err(Error::new("only a FUSE disk can do that")),
        }
    }

    /// The trouble since [`Disk::trouble`]; `None` where nobody counts.
    ///
    /// # Errors
    /// The disk does not answer.
    pub async fn count(&mut self) -> Result<Option<Counters>, Error> {
        match &mut self.body {
            Body::Fuse(disk) => disk.count().await.map(Some),
            Body::Plain | Body::Ext4(_) => Ok(None),
        }
    }
}
