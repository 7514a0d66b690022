//! The committed pictures are those that `genesis-worker draw` makes, and can be distilled.

use std::path::Path;
use std::process::Command;

use genesis_worker::{Picture, distill, draw, rms, sample};

const COUNT: u64 = 12;

fn assets() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets")
}

#[test]
fn the_committed_pictures_are_drawn_again_and_distilled() {
    let directory = tempfile::tempdir().unwrap();
    let made = Command::new(env!("CARGO_BIN_EXE_genesis-worker"))
        .args(["draw", "--count", "12", "--seed", "1", "--out"])
        .arg(directory.path())
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    let mut size_sum = 0;
    for index in 0..COUNT {
        let name = format!("checkerboard-{index:02}.png");
        let committed = std::fs::read(assets().join(&name)).unwrap();
        size_sum += committed.len();
        let committed = Picture::from_png(&committed).unwrap();
        let drawn = std::fs::read(directory.path().join(&name)).unwrap();
        assert_eq!(Picture::from_png(&drawn).unwrap(), committed, "{name}");

        let (seed, _) = sample(1, index);
        let found = distill(&committed).unwrap();
        assert_eq!(
            (found.cell_px, found.phase_x_px, found.phase_y_px),
            (seed.cell_px, seed.phase_x_px, seed.phase_y_px),
            "{name}"
        );
        let error = rms(&draw(&found), &committed).unwrap();
        assert!(error <= seed.noise_sigma * 1.1 + 0.5, "{name}: {error}");
    }
    assert!(size_sum < 400 * 1024, "{size_sum}");
}

#[test]
fn a_directory_that_cannot_be_made_is_named() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let out = file.path().join("pictures");
    let output = Command::new(env!("CARGO_BIN_EXE_genesis-worker")).args(["draw", "--out"]).arg(&out).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains(out.to_str().unwrap()), "{error}");
}
