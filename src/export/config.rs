/*! The `config.json` of an export. */

use serde_json::Value;

use crate::checkpoint::Dtype;

/// The checkpoint's `config.json` without what says that it is one, for weights of that type. `quantization` says how
/// another program reads them.
pub(super) fn config(checkpoint: &Value, dtype: Dtype, quantization: Option<Value>) -> Value {
    let mut config = checkpoint.clone();
    let fields = config.as_object_mut().expect("a checkpoint's config.json is an object");
    fields.shift_remove("quantization_config");
    // transformers 5 writes the first and reads both; vLLM, SGLang and older programs read the second.
    let keys: Vec<_> =
        ["dtype", "torch_dtype"].into_iter().filter(|key| fields.contains_key(*key)).collect();
    let keys = if keys.is_empty() { vec!["torch_dtype"] } else { keys };
    for key in keys {
        fields.insert(key.to_owned(), name(dtype).into());
    }
    if let Some(quantization) = quantization {
        fields.insert("quantization_config".to_owned(), quantization);
    }
    config
}

/// A type of weights as `config.json` names it.
fn name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::BF16 => "bfloat16",
        Dtype::F16 => "float16",
        _ => "float32",
    }
}
