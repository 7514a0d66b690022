//! As `sim/build.rs` does for the program without bugs: crates that look `getrandom` up by its name while the
//! program runs must find the simulation's.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg-bins=-Wl,--export-dynamic-symbol=getrandom");
}
