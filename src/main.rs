use atom::backend::cpu::Cpu;
use atom::pipeline::progress::Silent;
use atom::pipeline::*;
use atom::text::*;
use atom::recipe::*;
use std::path::Path;
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let r = || -> atom::Result<()> {
        let backend = Cpu::new()?;
        let windows = std::env::var("W").ok().map(|w| w.parse().unwrap());
        let text = TextSet::load(&a[3], Split::Evaluation)?;
        let evaluation = Evaluation { text, seq_len: 2048, windows };
        match a[1].as_str() {
            "eval" => {
                let m = atom::eval::Model::open(&a[2])?;
                println!("{:#?}", atom::eval::perplexity(&backend, &m, &evaluation, &Silent)?);
            }
            "quantize" => {
                let source = atom::hub::source(&a[2])?;
                let text = TextSet::load(&a[4], Split::Calibration)?;
                let c = Calibration { text, samples: std::env::var("N").unwrap().parse().unwrap(), seq_len: 2048, seed: 0 };
                let recipe = Recipe::resolve(&a[5], &a[6].parse().unwrap())?;
                let o = Output { out: Path::new("/tmp/out").join(&a[7]), overwrite: true, resume: false };
                let q = quantize(&backend, &source, &c, &recipe, &o, Some(&evaluation), &Silent)?;
                println!("{:?} {} {:?} rss {} bpw {}", q.perplexity, q.seconds, q.stage_seconds, q.peak_rss_bytes, q.bits_per_weight);
                for l in q.linears.iter().take(7) { println!("{} {:.4}", l.name, l.error); }
            }
            _ => {}
        }
        Ok(())
    };
    if let Err(e) = r() { eprintln!("error {e} {:?}", e.hint_text()); }
}
