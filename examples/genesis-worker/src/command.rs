//! The command line: serve, or draw sample pictures.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;

use serde_json::json;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::http::serve;
use crate::picture::PictureError;
use crate::sample::sample;

/// Arguments of `genesis-worker`.
#[derive(Debug, Clone, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    /// What to do other than serve.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Address to serve HTTP on; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:3000")]
    pub listen: SocketAddr,
    /// Print the address as JSON
    #[arg(long)]
    pub json: bool,
}

/// What to do other than serve.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum Command {
    /// Draw sample pictures as PNG files; the same numbers give the same pictures
    Draw(DrawArgs),
}

/// Arguments of `genesis-worker draw`.
#[derive(Debug, Clone, clap::Args)]
pub struct DrawArgs {
    /// Directory for the files, made when it is missing
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Number of pictures
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub count: u64,
    /// Number of the set
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Print one JSON object a picture
    #[arg(long)]
    pub json: bool,
}

/// Why a command ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address asked for.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// Signals, standard output or the listener failed.
    #[error("{action}: {source}")]
    Serve {
        /// What was being done.
        action: &'static str,
        /// What failed.
        source: io::Error,
    },
    /// A picture could not be written.
    #[error("cannot write {path}: {reason}", path = path.display())]
    Write {
        /// File or directory.
        path: PathBuf,
        /// What failed.
        reason: String,
    },
}

/// Does what the arguments say. Serving ends with SIGTERM or SIGINT, after open requests.
///
/// The first line on standard output is `listening on http://ADDRESS`, or with `--json`
/// `{"listening":"http://ADDRESS","address":"ADDRESS"}`, printed when connections are taken.
///
/// # Errors
/// [`Error`], one line each.
pub async fn run(args: Args) -> Result<(), Error> {
    match args.command {
        Some(Command::Draw(draw)) => draw_samples(&draw),
        None => listen(args.listen, args.json).await,
    }
}

async fn listen(address: SocketAddr, as_json: bool) -> Result<(), Error> {
    let failed = |action| move |source| Error::Serve { action, source };
    // Signals first: whoever reads the line below may stop us at once.
    let mut terminate = signal(SignalKind::terminate()).map_err(failed("signals"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed("signals"))?;
    let listener = TcpListener::bind(address).await;
    let listener = listener.map_err(|source| Error::Listen { address, source })?;
    let bound = listener.local_addr().map_err(failed("listener"))?;
    let url = format!("http://{bound}");
    let line =
        if as_json { json!({ "listening": url, "address": bound }).to_string() } else { format!("listening on {url}") };
    print_line(&line)?;
    serve(listener, async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping");
    })
    .await
    .map_err(failed("listener"))
}

fn print_line(line: &str) -> Result<(), Error> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")
        .and_then(|()| out.flush())
        .map_err(|source| Error::Serve { action: "standard output", source })
}

fn draw_samples(args: &DrawArgs) -> Result<(), Error> {
    let failed = |path: &PathBuf, reason: String| Error::Write { path: path.clone(), reason };
    std::fs::create_dir_all(&args.out).map_err(|error| failed(&args.out, error.to_string()))?;
    for index in 0..args.count {
        let (seed, picture) = sample(args.seed, index);
        let path = args.out.join(format!("checkerboard-{index:02}.png"));
        let png = picture.to_png();
        let png = png.map_err(|error: PictureError| failed(&path, error.to_string()))?;
        std::fs::write(&path, png).map_err(|error| failed(&path, error.to_string()))?;
        if args.json {
            print_line(&json!({ "file": path, "seed": seed }).to_string())?;
        } else {
            print_line(&format!(
                "{}: {}x{}, cell {} px, noise {:.1}",
                path.display(),
                seed.width,
                seed.height,
                seed.cell_px,
                seed.noise_sigma
            ))?;
        }
    }
    Ok(())
}
