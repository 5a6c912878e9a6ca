//! Writes model files of random weights in the shapes of real models, for benchmarks.
//!
//! `shapes --out FOLDER 1b:Q4_0 1b:Q4_K_M 1b:Q8_0 8b:Q4_0`

use std::path::PathBuf;

use anyhow::Result;
use benches::shapes::Recipe;
use clap::Parser;

#[derive(Parser)]
struct Options {
    /// SHAPE:FORMAT, of tiny, 1b and 8b, and of Q4_0, Q4_K_M and Q8_0
    #[arg(required = true)]
    recipes: Vec<Recipe>,
    /// Folder for the files; those that are there already stay
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// GGUF file whose tokenizer they get
    #[arg(long, value_name = "FILE")]
    vocabulary: PathBuf,
    /// Chat template to put in
    #[arg(long, value_name = "FILE")]
    template: Option<PathBuf>,
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> Result<()> {
    let options = Options::parse();
    std::fs::create_dir_all(&options.out)?;
    let template = options.template.map(std::fs::read_to_string).transpose()?;
    for recipe in &options.recipes {
        let path = options.out.join(recipe.file_name());
        if !path.exists() {
            eprintln!("Writing {}", path.display());
            recipe.write(
                &path,
                &options.vocabulary,
                template.as_deref(),
                options.seed,
            )?;
        }
        println!("{}", path.display());
    }
    Ok(())
}
