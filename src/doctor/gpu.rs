/*! GPUs and what they need: the driver, CUDA's libraries, the cache of kernels. */

use std::path::PathBuf;

use super::{Check, Gpus, Status, arithmetic, storage};
use crate::Result;
use crate::backend::cuda::libraries::{self, Device, Version};
use crate::backend::cuda::{Cuda, compile};
use crate::units;

/// Everything about GPUs.
pub(super) fn all(gpus: Gpus, memory_bytes: Option<u64>) -> Vec<Check> {
    // Without one asked for by its number, the CPU does the same work.
    let lacking = match gpus {
        Gpus::Without => return vec![Check::note("gpu", "left out by --device cpu")],
        Gpus::Any => Status::Note,
        Gpus::One(_) => Status::Fault,
    };
    let driver = match libraries::driver() {
        Ok(driver) => driver,
        Err(error) => {
            let mut check = Check::of_error("gpu", lacking, &error);
            if gpus == Gpus::Any {
                check.detail.push_str("; --device auto runs on the CPU");
            }
            // What lies ready for a GPU is worth knowing; what does not is not missed without one.
            let toolkit = toolkit()
                .into_iter()
                .filter_map(|(name, found)| found.ok().map(|detail| Check::ok(name, detail)));
            return [check].into_iter().chain(toolkit).chain([kernel_cache()]).collect();
        }
    };
    let plural = if driver.devices == 1 { "" } else { "s" };
    let detail = format!("CUDA {}, {} device{plural}", driver.version, driver.devices);
    let mut checks = vec![Check::ok("cuda driver", found(detail, "cuda"))];
    let toolkit = toolkit();
    let complete = toolkit.iter().all(|(_, found)| found.is_ok());
    checks.extend(toolkit.map(|(name, found)| match found {
        Ok(detail) => Check::ok(name, detail),
        Err(error) => Check::of_error(name, lacking, &error),
    }));
    if driver.devices > 1 {
        checks.push(match libraries::nccl() {
            Ok(version) => Check::ok("nccl", found(version, "nccl")),
            Err(error) => Check::of_error("nccl", Status::Note, &error),
        });
    }
    checks.push(kernel_cache());
    let ordinals = match gpus {
        Gpus::One(ordinal) => ordinal..ordinal + 1,
        _ => 0..driver.devices,
    };
    for ordinal in ordinals {
        let name = format!("cuda:{ordinal}");
        match libraries::device(ordinal) {
            Err(error) => checks.push(Check::of_error(&name, lacking, &error)),
            Ok(device) if complete => checks.extend(opened(&device, memory_bytes, lacking)),
            Ok(device) => {
                let detail = format!("{}; a library is missing to use it", described(&device));
                checks.push(Check::new(&name, lacking, detail).hint("see the libraries above"));
            }
        }
    }
    checks
}

/// CUDA's libraries: where each was found.
fn toolkit() -> [(&'static str, Result<String>); 3] {
    [
        ("nvrtc", libraries::nvrtc().map(|version| found(format!("CUDA {version}"), "nvrtc"))),
        ("cublaslt", libraries::cublaslt().map(|()| found("found".to_owned(), "cublasLt"))),
        ("cusolver", libraries::cusolver().map(|()| found("found".to_owned(), "cusolver"))),
    ]
}

/// What is known without opening it.
fn described(device: &Device) -> String {
    let Version { major, minor } = device.capability;
    format!(
        "{}, compute capability {major}.{minor}, {}",
        device.name,
        units::bytes(device.memory_bytes as u64)
    )
}

/// A device at work.
fn opened(device: &Device, memory_bytes: Option<u64>, lacking: Status) -> Vec<Check> {
    let name = format!("cuda:{}", device.ordinal);
    let cuda = match Cuda::open(device.ordinal, memory_bytes) {
        Ok(cuda) => cuda,
        Err(error) => {
            let mut check = Check::of_error(&name, lacking, &error);
            check.detail = format!("{}: {}", described(device), check.detail);
            return vec![check];
        }
    };
    let may = if memory_bytes.is_some() { "may be used" } else { "free" };
    let detail = format!(
        "{}, {} {may}; codes of 4 bits by {}",
        described(device),
        units::bytes(cuda.gpu().limit_bytes()),
        cuda.multiplies_by()
    );
    vec![Check::ok(&name, detail), arithmetic::on_gpu(&name, &cuda)]
}

/// A detail, and the file that the library was found in.
fn found(detail: String, library: &str) -> String {
    match libraries::opened(library) {
        Some(path) => format!("{detail}, {}", path.display()),
        None => detail,
    }
}

/// Where compiled kernels are kept.
fn kernel_cache() -> Check {
    judge_cache(compile::cache_directory())
}

fn judge_cache(directory: Option<PathBuf>) -> Check {
    const NAME: &str = "kernel cache";
    let variable = compile::CACHE_VARIABLE;
    let elsewhere = format!(
        "name a directory that can be written in {variable}; without one each start compiles its \
         kernels again"
    );
    let Some(directory) = directory else {
        return Check::note(NAME, "no variable says where it would be").hint(elsewhere);
    };
    let shown = directory.display();
    let written: Result<()> = match storage::existing(&directory) {
        // A file in the way would be found only when the directory is made.
        Some(there) if there == directory || !directory.exists() => storage::try_to_write(there),
        _ => Err(crate::Error::machine("it is not a directory")),
    };
    match written {
        Ok(()) => {
            let kept = kept(&directory);
            let plural = if kept == 1 { "" } else { "s" };
            Check::ok(NAME, format!("{kept} file{plural} of machine code in {shown}"))
        }
        Err(error) => {
            Check::note(NAME, format!("{shown} cannot be written: {error}")).hint(elsewhere)
        }
    }
}

/// How many files of machine code are kept.
fn kept(directory: &std::path::Path) -> usize {
    let entries = fs_err::read_dir(directory).into_iter().flatten().flatten();
    entries.filter(|entry| entry.path().extension().is_some_and(|end| end == "cubin")).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_is_counted_and_one_that_cannot_be_written_noted() {
        let home = tempfile::tempdir().unwrap();
        let cache = home.path().join("kernels");
        let check = judge_cache(Some(cache.clone()));
        assert_eq!(check.status, Status::Ok, "{check:?}");
        assert!(!cache.exists(), "looking makes nothing");
        fs_err::create_dir(&cache).unwrap();
        fs_err::write(cache.join("a.cubin"), "x").unwrap();
        fs_err::write(cache.join("b.txt"), "x").unwrap();
        let check = judge_cache(Some(cache.clone()));
        assert!(check.detail.starts_with("1 file of machine code in "), "{check:?}");
        for bad in [Some(cache.join("b.txt")), None] {
            let check = judge_cache(bad);
            assert_eq!(check.status, Status::Note, "{check:?}");
            assert!(check.hint.unwrap().contains("ATOM_KERNEL_CACHE"));
        }
    }
}
