use super::*;
use crate::checkpoint::Dtype;

fn specs() -> Vec<TensorSpec> {
    vec![
        TensorSpec::new("a", Dtype::U8, [3]),
        TensorSpec::new("b", Dtype::F16, [2, 2]),
        TensorSpec::new("c", Dtype::I32, [5]),
        TensorSpec::new("d", Dtype::I8, [0]),
    ]
}

#[test]
fn every_tensor_starts_at_a_multiple_of_its_element_size() {
    let layout = Layout::new(specs(), 1000).unwrap();
    assert_eq!(layout.shards.len(), 1);
    assert_eq!(layout.shards[0].name, "model.safetensors");
    assert!(layout.index().is_none());
    assert_eq!(layout.shards[0].header.len() % 8, 0);
    for place in layout.places.values() {
        assert_eq!(place.offset % place.spec.dtype.size_bytes() as u64, 0);
    }
    assert_eq!(layout.file_bytes(), layout.shards[0].header.len() as u64 + 3 + 8 + 20);
}

#[test]
fn a_tiny_limit_gives_a_shard_for_each_large_tensor() {
    let layout = Layout::new(specs(), 5).unwrap();
    let names: Vec<&str> = layout.shards.iter().map(|shard| shard.name.as_str()).collect();
    assert_eq!(names.len(), 4);
    assert_eq!(names[0], "model-00001-of-00004.safetensors");
    let index = layout.index().unwrap();
    assert_eq!(index["metadata"]["total_size"], 31);
    assert_eq!(index["weight_map"]["c"], "model-00003-of-00004.safetensors");
}

#[test]
fn a_name_cannot_be_planned_twice() {
    for limit in [5, 1000] {
        let twice = vec![TensorSpec::new("a", Dtype::I32, [3]); 2];
        let error = Layout::new(twice, limit).err().unwrap();
        assert_eq!(error.message(), "tensor `a` is planned twice");
    }
}

#[test]
fn one_file_of_another_format_has_the_header_and_the_places_it_is_given() {
    let tensor = |name: &str, bytes: usize| TensorSpec::new(name, Dtype::U8, [bytes]);
    let file = |tensors| SingleFile {
        name: "x.gguf".to_owned(),
        header: b"header".to_vec(),
        tensors,
        bytes: 50,
    };
    let tensors = vec![(tensor("a", 5), 8), (tensor("b", 7), 16)];
    let layout = Layout::new(TensorFiles::Single(file(tensors)), 3).unwrap();
    let shard = &layout.shards[0];
    assert_eq!(
        (&shard.name[..], &shard.header[..], shard.file_bytes),
        ("x.gguf", &b"header"[..], 50)
    );
    assert_eq!((layout.places["a"].offset, layout.places["b"].offset), (8, 16));
    assert!(layout.index().is_none());
    let twice = vec![(tensor("a", 5), 8), (tensor("a", 5), 16)];
    let error = Layout::new(TensorFiles::Single(file(twice)), 3).err().unwrap();
    assert!(error.message().contains("`a` is planned twice"), "{error}");
}
