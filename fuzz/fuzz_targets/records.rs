#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| arqon_fuzz::records(data));
