//! Writes the entries that each target's corpus begins with to `tools/fuzz/corpus/TARGET`. The same
//! each time; other files there (what fuzzing found) stay. `cargo run -p fuzz-targets --example corpus`

#![allow(clippy::unwrap_used)]

use std::path::Path;

fn main() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../corpus");
    for target in fuzz_targets::TARGETS {
        let dir = corpus.join(target.name);
        std::fs::create_dir_all(&dir).unwrap();
        let seeds = target.seeds();
        for (name, bytes) in &seeds {
            std::fs::write(dir.join(name), bytes).unwrap();
        }
        println!("{}: {} entries", target.name, seeds.len());
    }
}
