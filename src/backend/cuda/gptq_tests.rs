use super::*;
use crate::quant::number::{NumberFormat, OutlierFormat, ScaleFormat};

#[test]
fn a_group_never_begins_inside_a_span_and_ends_outside_it() {
    for (group_size, groups) in [(16, 9), (48, 7), (128, 3), (192, 3), (304, 1), (96, 5)] {
        let numbers =
            NumberFormat { bits: 4, codebook: Codebook::Int, group_size, scale: ScaleFormat::F16 };
        let format =
            RowFormat { numbers, groups, outlier_channels: 5, outlier_format: OutlierFormat::Int8 };
        let spans = spans(&format);
        assert_eq!(spans[0].start, 0);
        assert_eq!(spans[spans.len() - 1].end, format.grouped_channels());
        assert!(spans.windows(2).all(|pair| pair[0].end == pair[1].start));
        for Range { start: first, end } in spans {
            assert!(end - first <= SPAN);
            if group_size <= SPAN {
                assert!(first % group_size == 0 && end % group_size == 0);
            } else {
                assert_eq!(first / group_size, (end - 1) / group_size);
            }
        }
    }
}
