import ControlAPI
import DeviceHost
import Testing
import Transport

/// What operators are shown of a device follows its gauges.
@Suite struct ReadingTests {
  @Test func readingsAreOfTheMomentAtWhichTheyAreAsked() {
    let (gauge, state) = (Gauge(3), Gauge())
    let members: [Reading.Member] = [
      .init("fixed", .string("text")), .init("count", .count(gauge)), .init("address", .address(gauge)),
      .init("flag", .flag(gauge, bit: 2)),
      .init("words", .text(["now ", .count(gauge), ", ", .choice(state, ["off", "on"])])),
      .init("list", .list([[.init("state", .choice(state, ["off", "on"]))]])),
    ]
    func text() -> String { JSONText.text(.object(members.map(\.json))) }
    #expect(
      text()
        == #"{"fixed":"text","count":3,"address":"0x3","flag":false,"words":"now 3, off","list":[{"state":"off"}]}"#)
    gauge.set(20)
    // The last choice is for every greater number, whatever a gauge says.
    state.set(.max)
    #expect(
      text()
        == #"{"fixed":"text","count":20,"address":"0x14","flag":true,"words":"now 20, on","list":[{"state":"on"}]}"#)
    gauge.add(.max)
    #expect(members[1].json.value == 19)
  }
}
