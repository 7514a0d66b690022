//! The pictures of the demo's jobs.

use std::path::{Path, PathBuf};

use arqon_proto::limits;
use arqon_sdk::{EventType, NewEvent};
use genesis_worker::{DistillRequest, Picture};

use crate::Failure;
use crate::cluster::file_failed;

/// Schema of the jobs.
pub const JOB_SCHEMA: &str = "arqonbus.genesis.job.v1";
/// Pictures of one run.
const PICTURE_COUNT_MAX: usize = 10_000;
/// Largest file that is read, in bytes; base64 makes a third more of it.
const FILE_SIZE_MAX: u64 = limits::PAYLOAD_SIZE_MAX as u64;

macro_rules! asset {
    ($name:literal) => {
        ($name, include_bytes!(concat!("../../../examples/assets/", $name)))
    };
}

// In the binary, so that it runs where there is no checkout.
const ASSETS: [(&str, &[u8]); 12] = [
    asset!("checkerboard-00.png"),
    asset!("checkerboard-01.png"),
    asset!("checkerboard-02.png"),
    asset!("checkerboard-03.png"),
    asset!("checkerboard-04.png"),
    asset!("checkerboard-05.png"),
    asset!("checkerboard-06.png"),
    asset!("checkerboard-07.png"),
    asset!("checkerboard-08.png"),
    asset!("checkerboard-09.png"),
    asset!("checkerboard-10.png"),
    asset!("checkerboard-11.png"),
];

struct Source {
    picture: Picture,
    request: DistillRequest,
}

/// What the jobs are made of: job `index` has picture `index % count`.
pub struct Pictures {
    sources: Vec<Source>,
}

impl Pictures {
    /// Every file of `folder` in the order of their names, or the pictures of this program.
    ///
    /// # Errors
    /// The first file that is not a picture or makes a job that is too large.
    pub fn load(folder: Option<&Path>) -> Result<Self, Failure> {
        let Some(folder) = folder else {
            let sources = ASSETS.iter().map(|(name, png)| source(Path::new(name), png));
            return Ok(Self { sources: sources.collect::<Result<_, _>>()? });
        };
        let sources: Vec<Source> =
            files(folder)?.iter().map(|path| source(path, &read(path)?)).collect::<Result<_, _>>()?;
        if sources.is_empty() {
            return Err(Failure::failed("holds no pictures").at(folder.display()));
        }
        Ok(Self { sources })
    }

    /// Number of different pictures.
    pub fn count(&self) -> usize {
        self.sources.len()
    }

    /// The picture of job `index`.
    pub fn picture(&self, index: usize) -> &Picture {
        &self.sources[index % self.sources.len()].picture
    }

    /// Job `index`.
    ///
    /// # Errors
    /// None in practice: the request cannot be written as JSON.
    pub fn job(&self, index: usize) -> Result<NewEvent, Failure> {
        let id = job_id(index);
        let request =
            DistillRequest { job_id: Some(id.clone()), ..self.sources[index % self.sources.len()].request.clone() };
        let payload = serde_json::to_vec(&request).map_err(Failure::failed)?;
        Ok(NewEvent::new(payload).schema(JOB_SCHEMA).key(id).event_type(EventType::Job))
    }
}

/// The id of job `index`.
pub fn job_id(index: usize) -> String {
    format!("job-{index:06}")
}

/// The index of the job with this id.
pub fn job_index(id: &str) -> Option<usize> {
    let index = id.strip_prefix("job-")?.parse().ok()?;
    (job_id(index) == id).then_some(index)
}

fn files(folder: &Path) -> Result<Vec<PathBuf>, Failure> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|error| file_failed(folder, &error))? {
        let path = entry.map_err(|error| file_failed(folder, &error))?.path();
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if path.is_file() && !hidden {
            paths.push(path);
        }
        if paths.len() > PICTURE_COUNT_MAX {
            return Err(Failure::failed(format!("holds more than {PICTURE_COUNT_MAX} files")).at(folder.display()));
        }
    }
    paths.sort();
    Ok(paths)
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    let size = path.metadata().map_err(|error| file_failed(path, &error))?.len();
    if size > FILE_SIZE_MAX {
        return Err(Failure::failed(format!("has {size} bytes, too large for a job")).at(path.display()));
    }
    std::fs::read(path).map_err(|error| file_failed(path, &error))
}

fn source(path: &Path, png: &[u8]) -> Result<Source, Failure> {
    let failed = |problem: String| Failure::failed(problem).at(path.display());
    let request = DistillRequest::for_png(Some(job_id(0)), png);
    let request = request.map_err(|error| failed(format!("not a picture that can be used: {error}")))?;
    let size = serde_json::to_vec(&request).map_err(Failure::failed)?.len();
    if size > limits::PAYLOAD_SIZE_MAX {
        let limit = limits::PAYLOAD_SIZE_MAX;
        return Err(failed(format!("makes a job of {size} bytes, the limit is {limit}")));
    }
    let picture = Picture::from_png(png).map_err(|error| failed(error.to_string()))?;
    Ok(Source { picture, request })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pictures_of_the_program_make_jobs() {
        let pictures = Pictures::load(None).unwrap();
        assert_eq!(pictures.count(), 12);
        let job = pictures.job(13).unwrap();
        let request = DistillRequest::from_json(&job.payload).unwrap();
        assert_eq!(request.job_id.as_deref(), Some("job-000013"));
        assert_eq!(&request.picture().unwrap(), pictures.picture(1));
    }

    #[test]
    fn a_file_that_is_no_picture_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = Pictures::load(Some(folder.path())).err().unwrap();
        assert!(error.to_string().contains("no pictures"), "{error}");
        std::fs::write(folder.path().join("a.png"), ASSETS[0].1).unwrap();
        assert_eq!(Pictures::load(Some(folder.path())).unwrap().count(), 1);
        std::fs::write(folder.path().join("notes.txt"), "hello").unwrap();
        let error = Pictures::load(Some(folder.path())).err().unwrap().to_string();
        assert!(error.contains("notes.txt") && !error.contains('\n'), "{error}");
    }

    #[test]
    fn only_own_ids_have_an_index() {
        assert_eq!(job_index(&job_id(77)), Some(77));
        assert_eq!(job_index("job-77"), None);
        assert_eq!(job_index("other"), None);
    }
}
