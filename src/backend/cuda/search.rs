/*! Where CUDA's libraries lie when the loader does not find them by itself.

cudarc opens libraries by name, such as `libnvrtc.so.13`. glibc takes an object that is loaded
already for the one meant if its SONAME is that name, so opening a library by its path first, and
never closing it, is enough for cudarc to find it wherever it lies. */

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use libloading::Library;

/// The environment variable that names a directory of CUDA libraries, which goes before all others.
pub const VARIABLE: &str = "ATOM_CUDA_LIB";

/// Where NVIDIA's Python packages keep libraries, below `site-packages/nvidia`: of CUDA 13 all in
/// one directory, of CUDA 12 one directory a package.
const PACKAGES: [&str; 7] = [
    "cu13/lib",
    "cuda_nvrtc/lib",
    "nvjitlink/lib",
    "cublas/lib",
    "cusparse/lib",
    "cusolver/lib",
    "nccl/lib",
];

/// Where containers and WSL put the driver's library without telling the loader.
const DRIVER_PLACES: [&str; 2] = ["/usr/local/nvidia/lib64", "/usr/lib/wsl/lib"];

/// Opens libraries (`nvrtc` for `libnvrtc.so.13`) wherever they are found first. Each must come
/// after those it depends on. What cannot be found or opened is left out: whether it is missed
/// shows when it is used.
pub(super) fn preload(libraries: &[&str]) {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let chosen = variable(VARIABLE).map(PathBuf::from);
    let directories = directories(&variable);
    for library in libraries {
        let path = chosen.as_deref().and_then(|chosen| newest(chosen, library));
        if !path.is_some_and(|path| open(&path)) {
            open_first(library, &directories);
        }
    }
}

/// Opens the driver's library if it lies where only NVIDIA's own tools look.
pub(super) fn preload_driver() {
    open_first("cuda", &DRIVER_PLACES.map(PathBuf::from));
}

/// The file of a library (`nvrtc` for `libnvrtc.so.13`) that this process has open, as the system lists it.
pub fn opened(library: &str) -> Option<PathBuf> {
    let maps = fs_err::read_to_string("/proc/self/maps").ok()?;
    opened_in(&maps, library)
}

fn opened_in(maps: &str, library: &str) -> Option<PathBuf> {
    let start = format!("lib{library}.so");
    // The path is all after the fifth column, and may have spaces itself.
    let mut paths = maps.lines().filter_map(|line| line.find('/').map(|at| Path::new(&line[at..])));
    let is_named = |path: &&Path| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&start))
    };
    paths.find(is_named).map(Path::to_path_buf)
}

/// Opens a library where it is found first. One of the same name that is open, or that the loader
/// finds, also by `LD_LIBRARY_PATH`, goes before.
fn open_first(library: &str, directories: &[PathBuf]) {
    directories
        .iter()
        .filter_map(|directory| newest(directory, library))
        .find(|path| path.file_name().is_some_and(|name| open(name.as_ref())) || open(path));
}

/// Opens a library for ever; whether it could be opened.
fn open(path: &Path) -> bool {
    // SAFETY: opening runs the library's initializers. These are NVIDIA's own libraries, which
    // cudarc would open in the same way.
    let library = unsafe { Library::new(path) };
    library.map(std::mem::forget).is_ok()
}

/// Directories that may hold CUDA's libraries, in the order they are looked through.
fn directories(variable: &dyn Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let mut directories = Vec::new();
    directories.extend(variable("CUDA_HOME").map(|home| PathBuf::from(home).join("lib64")));
    directories.push(PathBuf::from("/usr/local/cuda/lib64"));
    for packages in python_packages(variable) {
        directories.extend(PACKAGES.iter().map(|package| packages.join("nvidia").join(package)));
    }
    directories
}

/// Package directories of the active environment, or else of the `python3` on the path. Python is
/// not run: its packages lie in known directories next to its own.
fn python_packages(variable: &dyn Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let mut prefixes: Vec<PathBuf> = Vec::new();
    if let Some(environment) = variable("VIRTUAL_ENV") {
        prefixes.push(environment.into());
    } else if let Some(python) = variable("PATH").and_then(|path| {
        std::env::split_paths(&path).map(|dir| dir.join("python3")).find(|file| file.is_file())
    }) {
        // An environment's python3 is a link out of it: packages may lie at both ends.
        let target = python.canonicalize().ok();
        for file in std::iter::once(python).chain(target) {
            prefixes.extend(file.ancestors().nth(2).map(Path::to_path_buf));
        }
        prefixes.dedup();
    }
    let mut packages = Vec::new();
    for prefix in &prefixes {
        for lib in ["lib", "lib64", "local/lib"] {
            for name in names(&prefix.join(lib)).iter().filter(|name| name.starts_with("python3")) {
                for leaf in ["site-packages", "dist-packages"] {
                    packages.push(prefix.join(lib).join(name).join(leaf));
                }
            }
        }
    }
    packages.retain(|dir| dir.is_dir());
    packages
}

/// The file of a library whose name is its SONAME: of `libnvrtc.so.13` and `libnvrtc.so.13.0.88`
/// the one with fewer numbers, and of `libnvrtc.so.12` and `libnvrtc.so.13` the newer.
fn newest(directory: &Path, library: &str) -> Option<PathBuf> {
    let start = format!("lib{library}.so.");
    let version = |name: &String| -> Option<Vec<u32>> {
        name.strip_prefix(&start)?.split('.').map(|number| number.parse().ok()).collect()
    };
    names(directory)
        .into_iter()
        .filter_map(|name| Some((version(&name)?, name)))
        .max_by_key(|(version, _)| (std::cmp::Reverse(version.len()), version.clone()))
        .map(|(_, name)| directory.join(name))
}

/// Names in a directory, sorted; none if it cannot be read.
fn names(directory: &Path) -> Vec<String> {
    let entries = fs_err::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_is_the_file_named_by_its_soname() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "libnvrtc.so",
            "libnvrtc.so.9",
            "libnvrtc.so.13",
            "libnvrtc.so.13.0.88",
            "libnvrtc.alt.so.13",
            "libnvrtc-builtins.so.13.0",
            "libnvrtc.so.13.old",
        ] {
            fs_err::write(dir.path().join(name), "").unwrap();
        }
        let found =
            |library| newest(dir.path(), library).map(|path| path.file_name().unwrap().to_owned());
        assert_eq!(found("nvrtc"), Some("libnvrtc.so.13".into()));
        assert_eq!(found("nvrtc-builtins"), Some("libnvrtc-builtins.so.13.0".into()));
        assert_eq!(found("cublas"), None);
        assert_eq!(newest(&dir.path().join("none"), "nvrtc"), None);
    }

    #[test]
    fn an_open_library_is_found_among_the_mapped_files() {
        let maps = "7f00-7f01 r--p 00000000 00:1f 12 /opt/my cuda/libnvrtc-builtins.so.13.0\n\
                    7f01-7f02 rw-p 00000000 00:00 0 \n\
                    7f02-7f03 r--p 00000000 00:1f 13 /opt/my cuda/libnvrtc.so.13\n";
        let found = opened_in(maps, "nvrtc");
        assert_eq!(found, Some(PathBuf::from("/opt/my cuda/libnvrtc.so.13")));
        assert_eq!(opened_in(maps, "cublasLt"), None);
    }

    #[test]
    fn the_toolkit_goes_before_the_active_environment() {
        let dir = tempfile::tempdir().unwrap();
        let packages = dir.path().join("lib/python3.11/site-packages");
        fs_err::create_dir_all(&packages).unwrap();
        let environment = |name: &str| match name {
            "CUDA_HOME" => Some(OsString::from("/opt/cuda")),
            "VIRTUAL_ENV" => Some(dir.path().into()),
            _ => None,
        };
        let found = directories(&environment);
        assert_eq!(found[..2], ["/opt/cuda/lib64", "/usr/local/cuda/lib64"].map(PathBuf::from));
        assert_eq!(found[2], packages.join("nvidia/cu13/lib"));
        assert_eq!(found.len(), 2 + PACKAGES.len());
    }

    #[test]
    fn packages_are_found_next_to_the_python_on_the_path() {
        let dir = tempfile::tempdir().unwrap();
        let (base, environment) = (dir.path().join("base"), dir.path().join("environment"));
        for prefix in [&base, &environment] {
            fs_err::create_dir_all(prefix.join("bin")).unwrap();
            fs_err::create_dir_all(prefix.join("lib/python3.11/site-packages")).unwrap();
        }
        fs_err::write(base.join("bin/python3"), "").unwrap();
        std::os::unix::fs::symlink(base.join("bin/python3"), environment.join("bin/python3"))
            .unwrap();
        let path =
            std::env::join_paths([dir.path().join("none"), environment.join("bin")]).unwrap();
        let found = python_packages(&|name| (name == "PATH").then(|| path.clone()));
        let base = base.canonicalize().unwrap();
        let expected =
            [environment, base].map(|prefix| prefix.join("lib/python3.11/site-packages"));
        assert_eq!(found, expected);
    }
}
