//! Compiles the .proto files with protox, so that no system `protoc` is needed.

use std::{env, error::Error, fs, path::PathBuf};

const FILES: [&str; 5] = ["event", "log", "frame", "peer", "control"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files = FILES.map(|name| format!("arqonbus/v1/{name}.proto"));
    let mut descriptors = protox::compile(files, ["proto"])?;
    // The reflection service serves the descriptors; comments and positions are not needed there.
    for file in &mut descriptors.file {
        file.source_code_info = None;
    }
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), prost::Message::encode_to_vec(&descriptors))?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
