use super::*;

#[test]
fn a_file_is_laid_out_byte_by_byte() {
    let mut metadata = Metadata::default();
    metadata.text("a", "xy");
    metadata.count("n", 7);
    let tensors = [
        TensorInfo { name: "w".into(), shape: vec![3, 64], kind: TensorType::Q4_0 },
        TensorInfo { name: "v".into(), shape: vec![5], kind: TensorType::F32 },
    ];
    let layout = lay_out(&metadata, &tensors);
    let mut expected: Vec<u8> = b"GGUF\x03\0\0\0".to_vec();
    expected.extend(b"\x02\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0");
    expected.extend(b"\x01\0\0\0\0\0\0\0a\x08\0\0\0\x02\0\0\0\0\0\0\0xy");
    expected.extend(b"\x01\0\0\0\0\0\0\0n\x04\0\0\0\x07\0\0\0");
    // Two dimensions, the row's length first; type 2; the first byte of the data.
    expected.extend(b"\x01\0\0\0\0\0\0\0w\x02\0\0\0\x40\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0\x02\0\0\0");
    expected.extend(b"\0\0\0\0\0\0\0\0");
    // 3 rows of 36 bytes are 108, and the next tensor begins at 128.
    expected.extend(b"\x01\0\0\0\0\0\0\0v\x01\0\0\0\x05\0\0\0\0\0\0\0\0\0\0\0\x80\0\0\0\0\0\0\0");
    let end = expected.len();
    assert_eq!(layout.header[..end], expected);
    assert_eq!(layout.header.len(), end.next_multiple_of(32));
    assert!(layout.header[end..].iter().all(|byte| *byte == 0));
    let first = layout.header.len() as u64;
    assert_eq!(layout.places, [first..first + 108, first + 128..first + 148]);
    assert_eq!(layout.bytes, first + 160);
}

#[test]
fn values_have_the_types_of_the_format() {
    let bytes = |value: Value| {
        let mut out = Vec::new();
        push_value(&mut out, &value);
        out
    };
    assert_eq!(bytes(Value::Bool(true)), b"\x07\0\0\0\x01");
    assert_eq!(bytes(Value::F32(1.0)), b"\x06\0\0\0\0\0\x80\x3f");
    assert_eq!(
        bytes(Value::Ints(vec![-1])),
        b"\x09\0\0\0\x05\0\0\0\x01\0\0\0\0\0\0\0\xff\xff\xff\xff"
    );
    assert_eq!(
        bytes(Value::Floats(vec![0.5])),
        b"\x09\0\0\0\x06\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\x3f"
    );
    assert_eq!(
        bytes(Value::Texts(vec!["\u{e9}".into()])),
        b"\x09\0\0\0\x08\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\xc3\xa9"
    );
}
