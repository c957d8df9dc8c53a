use super::*;
use proptest::prelude::*;

/// The definition, one bit at a time.
fn plain_pack(codes: &[i8], rows: usize, columns: usize, bits: u8) -> Vec<u8> {
    let (row, bits) = (row_bytes(columns, bits), usize::from(bits));
    let mut bytes = vec![0u8; rows * row];
    for r in 0..rows {
        for k in 0..columns * bits {
            let bit = codes[r * columns + k / bits] >> (k % bits) & 1;
            bytes[r * row + k / 8] |= (bit as u8) << (k % 8);
        }
    }
    bytes
}

#[test]
fn an_int4_byte_holds_the_even_channel_low() {
    assert_eq!(pack(&[1, -2, 7, -8], 1, 4, 4), [0xe1, 0x87]);
    assert_eq!(pack(&[1, -2, -1, 0], 1, 4, 2), [0b00_11_10_01]);
    // 001 110 011 100 000 111 010 101 from the low bit upward
    assert_eq!(pack(&[1, -2, 3, -4, 0, -1, 2, -3], 1, 8, 3), [0xf1, 0x88, 0xab]);
}

proptest! {
    #[test]
    fn packing_is_its_definition_and_unpacking_undoes_it(
        bits in prop::sample::select(vec![2u8, 3, 4, 8]),
        rows in 0usize..5,
        blocks in 0usize..9,
        seed in prop::collection::vec(any::<i8>(), 400),
    ) {
        let columns = 8 * blocks;
        let codes: Vec<i8> =
            seed[..rows * columns].iter().map(|&c| c << (8 - bits) >> (8 - bits)).collect();
        let packed = pack(&codes, rows, columns, bits);
        prop_assert_eq!(&packed, &plain_pack(&codes, rows, columns, bits));
        prop_assert_eq!(unpack(&packed, rows, columns, bits).unwrap(), codes);
    }
}

#[test]
fn many_tasks_join_to_one_stream() {
    let (rows, columns) = (3, CODES_PER_TASK / 2 + 8);
    for bits in [3u8, 4] {
        let codes: Vec<i8> = (0..rows * columns)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 16) as i8 >> (8 - bits))
            .collect();
        let packed = pack(&codes, rows, columns, bits);
        assert_eq!(packed, plain_pack(&codes, rows, columns, bits));
        assert_eq!(unpack(&packed, rows, columns, bits).unwrap(), codes);
    }
}

#[test]
fn what_cannot_be_codes_is_refused() {
    assert_eq!(
        unpack(&[0; 3], 1, 7, 3).unwrap_err().message(),
        "7 codes of 3 bits do not fill whole bytes"
    );
    assert_eq!(
        unpack(&[0; 7], 2, 8, 4).unwrap_err().message(),
        "codes [2, 8] of 4 bits need 8 bytes, found 7"
    );
    assert!(unpack(&[0; 5], 1, 8, 5).is_err());
}
